"""Pictures for a network: decoded, resized as its own processor does, and laid out at canonical shapes."""

from __future__ import annotations

import base64
import importlib.metadata
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from embedcache.backbone.compute import Numbers
from embedcache.backbone.device import WHOLE, threads
from embedcache.backbone.model import FrozenModel, Inputs, Outputs, hidden_of
from embedcache.backbone.network import quiet
from embedcache.backbone.processor import PictureProcessor, Values, noise
from embedcache.backbone.views import NO_VIEWS, Views
from embedcache.batching import Batch
from embedcache.errors import BackboneError
from embedcache.fingerprint import sha256_bytes
from embedcache.pictures import DECODING, Begun, decode
from embedcache.spec import FeatureSpec, PixelRange

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00{;M2nPlU2nPrX3JD7h77q;!3=JC;6%ZC69U>wi9UmVgC^Rf2CNU=;A1ysCF*P?jIyxgOKSVz`Lo_)$H~"
    "-rJLjej33JnYm8V?T|Hzgk>H#avoH#avoH#avoH#avoH#avoH#avoH#avoH#avoH#avoH#avoH#avoH#avoH#h&l01*fPB>*i00U`hb5di}c0sq7"
    "R82|tS0RaI30000000000000051_TEK|HJ?^5C8!J0|f*I3jqKC00000009640t68S1`;7b6ER_t6e2V=ak3RMLPSwxWPzcgvC;p;02u)Q0{{a60"
    "000000000000041qJ{C1OLPTD-i$z1ONmC1P1^B00000000310s{mE1`;6=6fr>)GBa{CLQ;XT!SMgu01N{G00I#M5dc2`$0XEHx(zkaR>-{!66U"
    "6y63FG-Y65ZzYu1ToEFkdSkIYeXO&k*omPQ=YtGeB2#foXNE0kmUna+0<_X%e+I(14%3}x5@hfcR7;poJ7cF{E*k<<DVhQuZ_3xB$$IBdG0l>JTx"
    "EV<E&4Dww8rzqG2f%aU!=stR&=&xIv7zSg&tzy`gnTP=%`p%T<3!co{k(SQ&JmlMsO#o}XQF=T@4iYt9V#5IA!$O$Zioo5=E@BmKjU_d+;0DH-b1"
    "K5bL~<+MP2(Ngw1KZ<cgR*&oY}Y0E0d#V&m`T+E{k_99KFroDO_JGWYXi?Z@LNLw2NYQ&$v<7Y0M;3;;dnrZ~;Xhc3?46{M@VqC)o#@J@u<Zcvu^"
    "zqcBmZJUKe7a6mDN=baNBlsgPu5QNJS@+b-pCPt~(yV_8E_y^=F+h;ol(jQ3gkf91ezLEF0^r~|g#!~j5%7wb4)FV}6;)EwTjPSTr1~^YT<^S0"
)
"""45 x 37 pixels, colour sampled 4:2:0, with an edge and grain: where decoders of JPEG differ."""
PNG = base64.b85decode(
    "iBL{Q4GJ0x0000DNk~Le00007000092nGNE0RC7uqW}N_5J^NqRCw9}1p)g00e?j4|6Mzo0Od8u0Z-^d|1Y2;PFXGsvn6Z-00b5W2Lb8<2ms#v3I"
    "7TG3IPBB`v3d=^-cx*`2Yen4-Nmy1QY+P`4>(Z_!Uh7{__C!{L8Wn^t1p1BL(vT*7f-T$nOgPAN~{o0|e{<`}WxY5#->r1nudlO#<+{vKjyn0URk"
    "00NxYf01oN}02{_o00PzWw6Y50%K$Ow>rEdA`2Y<H?EnPw836&?RZRrPB`Qwx{s*!k3jqKq&b|QR-5LSd5*`4fJMOXs$2M286bs`4G3B`bB(kmn("
    "bH&6vRfPgwOhsj0_PVbPWT-s01FEVP7vna{|fgK0O|}9vfdu)0Y$%Rrc$jA<^TWy07*qoM6N<$f&"
)
"""7 x 9 pixels with alpha."""


@dataclass(frozen=True)
class Pixels:
    """Prepared pictures: ``values`` uint8 [n, 3, H, W], or float32 of a processor whose work is no table.

    Each costs one position of a batch, and has ``patches`` vectors in a token-level set. Of a row with ``views`` the
    plain picture is the first of ``views`` + 1. Rows that are still ``begun`` are waited for where they are read.
    """

    room: Values
    patches: int
    truncated: int = 0
    views: int = 0
    begun: Begun | None = None

    @property
    def values(self) -> Values:
        """All of them. Raises ``PictureError`` for one that cannot be decoded."""
        self.wait()
        return self.room

    def wait(self, pictures: Numbers | None = None) -> None:
        """Wait until some pictures are there, None for all."""
        if self.begun is not None:
            self.begun.wait(None if pictures is None else np.unique(pictures // (self.views + 1)).tolist())

    @property
    def lengths(self) -> Numbers:
        """[n] ones: a picture is one position, whatever it shows."""
        return np.ones(len(self.room), np.int64)

    @property
    def vectors(self) -> Numbers:
        """[n] vectors of each row in a token-level set."""
        return np.full(len(self.room), self.patches, np.int64)

    def digests(self) -> list[str]:
        """Return a hash of each picture as it was decoded and resized: of all plain ones, then of each first view."""
        values = self.values
        by_view = [values[view :: self.views + 1] for view in range(self.views + 1)]
        return [sha256_bytes(np.ascontiguousarray(row).tobytes()) for rows in by_view for row in rows]


class Pictures:
    """The content that is images; see ``model.Content``.

    ``study`` looks at the network before anything is laid out for it: ``skip`` hidden states at the front are of the
    class and register tokens, ``channels_last`` says how a convolutional network wants its pixels in memory, and
    ``patches`` is how many vectors a token-level set has of each picture. ``normed`` says that the pooler is no more
    than a norm (CLIP's of the class token, BEiT's of the mean): the vector that the network was trained to give.
    ``last_norm`` is the norm that the last layer goes through, where it is one that layers of one shape can share.
    ``views`` are made of each row; ``pixel_range`` is that of pixels that have none of their own. ``values`` divides
    the number of values that any layer gives of a picture, see ``device.WHOLE``.
    """

    given = "pixels"
    probe_rows = (JPEG, PNG)

    def __init__(
        self, processor: PictureProcessor, network: torch.nn.Module, name: str, views: Views = NO_VIEWS,
        pixel_range: PixelRange | None = None,
    ) -> None:  # fmt: skip
        self.processor, self.name, self.views, self.pixel_range = processor, name, views, pixel_range
        parameter = next(network.parameters())
        self._dtype, self.device = parameter.dtype, parameter.device
        self.skip, self.patches, self.channels_last, self.normed, self.values = 0, 1, False, False, 1
        self.last_norm: torch.nn.Module | None = None

    @property
    def poolings(self) -> tuple[str, ...]:
        """Those of the class token only where there is one."""
        return (("cls", "cls+mean") if self.skip else ()) + (
            "mean", "max", "pooler", "projected", "tokens", "states",
        )  # fmt: skip

    @property
    def prepared_bytes(self) -> int:
        """The bytes of a picture's pixels, and of its views'."""
        height, width = self.processor.resizing.size
        return 3 * height * width * (4 if self.processor.table is None else 1) * (self.views.number + 1)

    def to_json(self) -> dict[str, object]:
        """Return how rows are prepared, as a spec holds it."""
        resizing = self.processor.resizing
        ranged = {} if self.pixel_range is None else {"pixel_range": list(self.pixel_range)}
        return {
            "kind": "image", "decoding": DECODING, "processor": self.processor.settings, "resize": resizing.how,
            "size": list(resizing.size), "memory_format": "channels_last" if self.channels_last else "contiguous",
            **ranged,
        }  # fmt: skip

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that make pixels of pictures."""
        from PIL import features

        versions = {name: importlib.metadata.version(name) for name in ("pillow", "transformers")}
        jpeg = "libjpeg_turbo" if features.check_feature("libjpeg_turbo") else "jpg"
        return {**versions, jpeg: str(features.version(jpeg))}

    def prepare(self, contents: Sequence[bytes]) -> Pixels:
        """Begin to decode and resize pictures, several at a time, and to make their views.

        Where one that cannot be decoded is read, ``PictureError`` is raised.
        """
        values = self._room(len(contents) * (self.views.number + 1))

        def put(row: int) -> None:
            image, first = decode(contents[row], self.pixel_range), row * (self.views.number + 1)
            for view in range(self.views.number + 1):
                values[first + view] = self.pixels(image, contents[row], view)

        return Pixels(values, self.patches, views=self.views.number, begun=Begun(put, range(len(contents))))

    def prepare_views(self, contents: Sequence[bytes], views: Numbers) -> Pixels:
        """Prepare one view of each picture, by its number [n]: 0 is the plain one."""
        values = self._room(len(contents))

        def put(row: int) -> None:
            values[row] = self.pixels(decode(contents[row], self.pixel_range), contents[row], int(views[row]))

        return Pixels(values, self.patches, begun=Begun(put, range(len(contents))))

    def pixels(self, image: Image.Image, content: bytes, view: int) -> Values:
        """Return a decoded picture, or a view of it, as the processor makes it."""
        if not view:
            return self.processor(image)
        (height, width), filter = self.processor.resizing.size, self.processor.resizing.filter
        made = self.views.make(image, content, view, (width, height), filter)
        return self.processor.sized(made) if self.views.resizes else self.processor(made)

    def _room(self, pictures: int) -> Values:
        kind = np.uint8 if self.processor.table is not None else np.float32
        # Channels last, as Pillow has them and convolutional networks read them.
        room: Values = np.empty((pictures, *self.processor.resizing.size, 3), kind).transpose(0, 3, 1, 2)
        return room

    def lay_out(self, prepared: Pixels, batch: Batch) -> Inputs:
        """Lay pictures out at a canonical shape: pixels [batch.rows, 3, H, W]; dummies are zeros."""
        values, real = self._blank(batch.rows), len(batch.indices)
        prepared.wait(batch.indices)
        self.processor.normalized([prepared.room[row] for row in batch.indices], values[:real])
        return self._inputs(values)

    def dummies(self, rows: int, length: int) -> Inputs:
        """Lay out zeros."""
        return self._inputs(self._blank(rows))

    def _blank(self, rows: int) -> Values:
        """Return zeros, float32 [rows, 3, H, W], in memory as the network wants them."""
        height, width = self.processor.resizing.size
        shape = (rows, height, width, 3) if self.channels_last else (rows, 3, height, width)
        blank: Values = np.zeros(shape, np.float32)
        return blank.transpose(0, 3, 1, 2) if self.channels_last else blank

    def _inputs(self, values: Values) -> Inputs:
        import torch

        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        pixels = torch.from_numpy(values).to(self._dtype, memory_format=layout)
        return Inputs({"pixel_values": pixels}, skip=self.skip)

    def samples(self) -> list[Inputs]:
        """Return two pictures, the same again, and the first beside another."""
        height, width = self.processor.resizing.size
        pictures = [self.processor(noise(width + more, height)) for more in range(3)]
        pixels = self.processor.normalized(np.stack(pictures))
        return [self._inputs(pixels[rows]) for rows in ([0, 1], [0, 1], [0, 2])]

    def everywhere(self, rows: int) -> Iterator[Inputs]:
        """Give batches of one picture in every place."""
        height, width = self.processor.resizing.size
        for more in range(4):
            picture = self.processor.normalized(self.processor(noise(width + more, height))[None])
            yield self._inputs(np.repeat(picture, rows, axis=0))

    def study(self, network: torch.nn.Module) -> Outputs | None:
        """Run two pictures, and read off the hidden states what they are; see the class. None where it cannot run.

        Raises ``BackboneError`` for a class token that stands behind some layers only.
        """
        import torch

        inputs = self.samples()[0].to(self.device)
        # What these give of a number is the same however many are taken at a time.
        exact = (torch.nn.Conv2d, torch.nn.ReLU, torch.nn.ReLU6, torch.nn.ZeroPad2d)
        normed: list[tuple[torch.nn.Module, Tensor]] = []
        counts: list[int] = []

        def note(module: torch.nn.Module, _: object, output: object) -> None:
            if not isinstance(output, torch.Tensor) or not output.ndim:
                return
            if not isinstance(module, exact):
                counts.append(output[0].numel())
            if isinstance(module, torch.nn.LayerNorm):
                normed.append((module, output))

        hooks = [module.register_forward_hook(note) for module in network.modules()]
        try:
            with torch.inference_mode(), quiet(), threads(1 if self.device.type == "cpu" else None):
                outputs: Outputs = network(**inputs.arguments, output_hidden_states=True)
            last, states = outputs.last_hidden_state, outputs.hidden_states
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError):
            return None  # what is wrong with it, the first pass of the model says
        finally:
            for hook in hooks:
                hook.remove()
        if last is None or not states:
            return None
        self.channels_last = last.ndim == 4
        pooled = getattr(outputs, "pooler_output", None)
        self.normed = any(output is pooled for _, output in normed)
        self.last_norm = next((module for module, output in normed if output is last and output.ndim == 3), None)
        self.values = math.gcd(*counts) or 1
        if _joined_late(states[0], last):
            raise BackboneError(
                f"{self.name}: {type(network).__name__} has a class token in its last layers only, which would count "
                "as a patch in every mean: use a model that has it from the first layer on, or has none"
            )
        if states[0].ndim == 3 and states[0].shape == last.shape:
            # What is the same in two pictures before any layer has looked at them is not a patch of either.
            alike = (states[0][0] == states[0][1]).all(dim=-1)
            self.skip = int(alike.cumprod(0).sum())
        return outputs

    def count_patches(self, specs: Sequence[FeatureSpec], outputs: Outputs) -> None:
        """Note how many vectors a token-level set has. Raises ``BackboneError`` where two sets differ in that."""
        counts = {
            spec.name: hidden_of(outputs, spec.layers[0]).shape[1] - (self.skip if spec.pooling == "tokens" else 0)
            for spec in specs if spec.token_level and spec.layers
        }  # fmt: skip
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise BackboneError(
                f"{self.name}: these sets have different numbers of vectors of a picture ({told}): "
                "extract a cache of each"
            )
        self.patches = next(iter(counts.values()), 1)


def refuse_misbehaving(model: FrozenModel[Pixels], pictures: Pictures) -> None:
    """Run a picture twice, beside another, and in every place of a batch: all must agree, or ``BackboneError``."""
    import torch

    kind, on_cpu = type(model.network).__name__, pictures.device.type == "cpu"
    with torch.inference_mode(), quiet(), threads(1 if on_cpu else None):
        once, again, beside = (
            model.outputs(inputs.to(pictures.device)).last_hidden_state[0].float() for inputs in pictures.samples()
        )
    allowed = 0.0 if on_cpu else 5e-3  # elsewhere some kernels differ from run to run by as much
    if (apart := _apart(once, again)) > allowed:
        raise BackboneError(
            f"{pictures.name}: {kind} gives other features of the same picture in each pass (by {apart:.1e} of their "
            "size): it is random, so nothing of it can be cached; use another model"
        )
    if (apart := _apart(once, beside)) > allowed:
        raise BackboneError(
            f"{pictures.name}: {kind} gives other features of a picture when another stands beside it in a batch (by "
            f"{apart:.1e} of their size; batch normalisation in training mode does so): use another model"
        )
    rows = model.policy.rows(1)
    whole = rows * pictures.values % WHOLE == 0
    if on_cpu and rows > 1 and not whole and any(_by_place(model, inputs) for inputs in pictures.everywhere(rows)):
        raise BackboneError(
            f"{pictures.name}: {kind} gives a picture other features in another place of a batch of {rows}: give "
            f"batches a multiple of {WHOLE} pictures (extract --batch-size)"
        )


def _by_place(model: FrozenModel[Pixels], inputs: Inputs) -> bool:
    import torch

    with torch.inference_mode(), quiet(), threads(model.policy.pass_threads):
        outputs = model.outputs(inputs)
    pooled = any(spec.pooling in ("pooler", "projected") for spec in model.specs)
    read = (outputs.last_hidden_state, *([outputs.pooler_output] if pooled else []))
    return not all(bool(((each == each[:1]) | each.isnan()).all()) for each in read)


def _joined_late(first: Tensor, last: Tensor) -> bool:
    """Whether a class token stands before the last vectors [B, T, D] and not before the first ones (PVT).

    Stages make one vector of so many of a stage before: that one vector is too many shows in the division.
    """
    if last.ndim != 3:
        return False
    positions, vectors = (first[0, 0] if first.ndim == 4 else first[0, :, 0]).numel(), last.shape[1]
    return 1 < vectors != positions and positions % vectors != 0 and positions % (vectors - 1) == 0


def _apart(a: Tensor, b: Tensor) -> float:
    """Return how far two tensors are apart, relative to their length; what is not finite is extraction's to report."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return 0.0
    return float((a - b).norm() / a.norm().clamp(min=1e-12))
