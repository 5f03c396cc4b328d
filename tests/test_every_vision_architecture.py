"""Every vision architecture of the installed transformers, made tiny: it works, or is refused in one line.

The names are those of transformers' own mappings, so that a new version's architectures are tried too. Each has its own
processor where that works with Pillow, made for small pictures. ``pytest -rA`` prints what became of each.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
import torch
from small_configs import SIDE, small

from embedcache.backbone import compute_features, load_backbone
from embedcache.errors import EmbedcacheError

PICTURES = tiny_pictures.pictures(3)
LARGEST = 6_000_000
"""Parameters of what still counts as tiny."""
TIMM = (
    "conditional_detr", "dab-detr", "deformable_detr", "detr", "edgetam", "edgetam_video", "edgetam_vision_model",
    "gemma3n_vision", "omdet-turbo", "table-transformer", "timm_backbone", "timm_wrapper",
)  # fmt: skip
NOT_TINY: dict[str, str] = {
    **dict.fromkeys(TIMM, "needs timm"), "dinat": "needs natten",
    **dict.fromkeys(
        ("d_fine", "deimv2", "depth_pro", "efficientloftr", "pp_doclayout_v3", "pp_doclayout_v4", "pp_ocrv6_medium_det",
         "rt_detr", "rt_detr_v2", "sam2", "sam2_hiera_det_model", "sam2_video", "sam2_vision_model", "uvdoc",
         "maskformer"),
        "a detector or of documents, whose settings do not make it small",
    ),
}  # fmt: skip
"""Architectures that cannot be made here -> why not."""
ANY_SIZE = (
    "cosmos3_edge_vision", "glm_image_vision", "hunyuan_vl_vision", "inkling2_vision", "minicpm_ocr_vision",
    "minicpmv4_7_vision", "muse_glimmer_vision", "muse_spark_vision", "siglip2_vision_model", "video_llama_3_vision",
)  # fmt: skip
WHOLE = (
    "aimv2", "altclip", "blip", "chinese_clip", "clip", "clipseg", "flava", "gemma3", "git", "groupvit", "idefics",
    "imagegpt", "internvl", "llava", "metaclip_2", "mllama", "owlv2", "owlvit", "paligemma", "qwen2_vl", "siglip",
    "siglip2", "tipsv2", "vilt",
)  # fmt: skip
"""Architectures of texts and images: their vision towers are tried, from the folder of the whole."""
PROMPTED = (
    "rf_detr", "sam3", "sam3_lite_text", "sam3_lite_text_text_model", "sam3_tracker", "sam3_tracker_video",
    "sam3_video", "seggpt", "vivit", "pp_ocrv5_mobile_rec", "pp_ocrv5_server_rec", "pp_ocrv6_small_det",
)  # fmt: skip
REFUSED: dict[str, str] = {
    **dict.fromkeys((*ANY_SIZE, *PROMPTED, "git", "llava", "paligemma"), "cannot run on pixels"),
    **dict.fromkeys(
        (
            "gemma3",
            "internvl",
            "mllama",
            "qwen2_vl",
            "siglip2",
            "vilt",
            "grounding-dino",
            "lw_detr",
            "mask2former",
            "mm-grounding-dino",
            "yolos",
            "pixtral",
            "sam",
            "sam_hq",
        ),
        "beside the pixels, as for pictures of any size",
    ),
    **dict.fromkeys(("timesformer", "videomae"), "its processor makes [1, 1, 3, 64, 64] of a picture"),
    **dict.fromkeys(("flava", "hgnet_v2", "mgp-str"), "gives no hidden states"),
    "idefics": "its processor makes no pixel_values of a picture",
    **dict.fromkeys(("pvt", "dinov3_convnext"), "has a class token in its last layers only"),
    **dict.fromkeys(("glpn", "swin2sr", "textnet"), "makes pictures of several sizes"),
    **dict.fromkeys(("imagegpt", "lightglue"), "its processor fails"),
    "vit_mae": "gives other features of the same picture in each pass",
}
"""Architectures that cannot be extracted -> what is said."""
SPECIAL: dict[str, int] = {
    **dict.fromkeys(
        ("beit", "blip-2", "chinese_clip_vision_model", "clip_vision_model", "data2vec-vision", "dinov2", "dinov3_vit",
         "dpt", "instructblip", "instructblipvideo", "internvl_vision", "kosmos-2", "mlcd", "mlcd_vision_model",
         "qianfan_ocr_vision", "vit", "vit_msn", "altclip", "blip", "chinese_clip", "clip", "clipseg", "metaclip_2",
         "owlv2", "owlvit"),
        1,
    ),
    **dict.fromkeys(("deit", "tipsv2", "tipsv2_vision_model"), 2),
    "dinov2_with_registers": 5, "pixio": 8, "sapiens2": 9, "radio": 10,
}  # fmt: skip
"""Architectures -> class and register tokens before the patches; none in the others."""
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32]}
SWIN: dict[str, Any] = {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("convnext", "convnextv2", "dinov3_convnext"), STAGES),
    "bit": {"num_groups": 8, **STAGES},
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin", "swin2sr"), SWIN),
    "cvt": {"embed_dim": [8, 24, 32], "depth": [1, 2, 3], "num_heads": [1, 1, 1]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "pvt": {"num_attention_heads": [1, 1, 1, 1], **STAGES},
    "resnet": {"embedding_size": 8, **STAGES},
    "textnet": {"hidden_sizes": [8, 8, 16, 24, 32], "stem_out_channels": 8},
}  # fmt: skip
"""Settings of architectures that are not made small, or not valid, by their names."""


def vision_architectures() -> list[str]:
    """Return the model types whose main input is pixels, and ``WHOLE``."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(kind for kind, name in MODEL_MAPPING_NAMES.items() if kind in WHOLE or reads_pixels(kind, name))


def reads_pixels(kind: str, name: str | tuple[str, ...]) -> bool:
    """Whether the main input is pixels: read in the code, and imported only where it does not say.

    To import all of transformers takes ten seconds, in every process that collects these tests.
    """
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(kind)
    code = "".join(file.read_text("utf-8") for file in sorted(folder.glob("modeling_*.py")))
    bases = name if isinstance(name, str) else name[0]
    while base := re.match(r"[\w.]*", bases.split(",")[-1].strip())[0]:  # of several, the last is the model
        if base == "PreTrainedModel":
            return False
        found = re.search(rf"^class {base}\(([^)]*)\):\n(.*?)(?=^\S|\Z)", code, re.MULTILINE | re.DOTALL)
        if found is None:  # in another module
            break
        if said := re.search(r"^    main_input_name\b.*?= *(.+)$", found[2], re.MULTILINE):
            return said[1] == '"pixel_values"'
        bases = found[1]
    with contextlib.suppress(Exception):  # a type of a package that is not here, or that there is no model of
        return getattr(model_class(kind), "main_input_name", "") == "pixel_values"
    return False


def model_class(kind: str) -> Any:
    import transformers

    found: Any = transformers.MODEL_MAPPING[transformers.CONFIG_MAPPING[kind]]
    return found[0] if isinstance(found, tuple) else found


def build(kind: str, folder: Path) -> None:
    """Save a tiny model of ``kind`` with its own processor, or ViT's where it has none that works with Pillow."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as PROCESSORS

    config_class = transformers.CONFIG_MAPPING[kind]
    config = config_class(**(small(config_class()) | SETTINGS.get(kind, {})))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(kind)(config).parameters())
    assert size < LARGEST, "the configuration is not tiny: give it settings"
    torch.manual_seed(3)
    network = model_class(kind)(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.normal_(0.0, 0.2)
    network.save_pretrained(folder)
    name = (PROCESSORS.get(kind) or {}).get("pil") or "ViTImageProcessorPil"
    written = json.loads(getattr(transformers, name)().to_json_string())
    sizes = {
        key: {side: SIDE if isinstance(value, int) else value for side, value in written[key].items()}
        for key in ("size", "crop_size") if isinstance(written.get(key), dict)
    }  # fmt: skip
    getattr(transformers, name)(**sizes).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")  # transformers' own, of a hundred authors
@pytest.mark.parametrize("kind", vision_architectures())
def test_an_architecture_works_or_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    if kind in NOT_TINY:
        pytest.skip(f"not made tiny: {NOT_TINY[kind]}")
    build(kind, tmp_path)
    said = ""
    try:
        backbone = load_backbone(
            str(tmp_path), features=["auto", "l2:mean"], device="cpu", positions=8, content="image"
        )
    except EmbedcacheError as error:
        said = str(error)
    print(f"{kind}: {said or 'works'}")
    assert "\n" not in said
    assert REFUSED.get(kind, "") in said
    if said:
        assert kind in REFUSED, said
        return
    assert getattr(backbone.content, "skip", None) == SPECIAL.get(kind, 0)
    assert backbone.specs[0].pooling in backbone.poolings
    together = compute_features(backbone, PICTURES, "l2:mean").values
    alone = np.concatenate([compute_features(backbone, [row], "l2:mean").values for row in PICTURES])
    assert np.isfinite(together).all()
    assert (together == alone).all(), f"bits depend on the batch: {(together != alone).sum()} of {together.size}"
    assert not (together[0] == together[1]).all()


def test_the_tables_are_of_architectures_that_there_are() -> None:
    assert not {*REFUSED, *SPECIAL} & set(NOT_TINY)
    from transformers import __version__

    if __version__.startswith("5.23"):
        assert {*REFUSED, *NOT_TINY, *SETTINGS, *SPECIAL} <= set(vision_architectures())
