"""What a comparison found: the table and the break-even, as text, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from embedcache.compare.approaches import APPROACHES
from embedcache.compare.figures import BreakEven, Facts, Row, header, memory_text, ratio_text, seconds_text
from embedcache.compare.measurements import Extraction
from embedcache.errors import MissingExtraError
from embedcache.wording import counted, shown


@dataclass(frozen=True)
class Comparison:
    """What was found.

    ``rows`` has one for each fraction and approach, means over the seeds; ``break_even`` one for each fraction and
    each approach that the cache is held against. ``extraction`` is of all rows. ``folder`` is where it lies, None where
    nothing was kept.
    """

    facts: Facts
    extraction: Extraction
    rows: Sequence[Row]
    break_even: Sequence[BreakEven]
    folder: Path | None = None

    def row(self, approach: str, fraction: float = 1.0) -> Row:
        """Return the row of an approach. Raises ``KeyError`` where there is none."""
        for row in self.rows:
            if (row.approach, row.fraction) == (approach, fraction):
                return row
        raise KeyError(f"{approach} at {fraction}")

    def to_json(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {
            "format": "embedcache-comparison",
            "version": 1,
            "facts": asdict(self.facts),
            "extraction": self.extraction.to_json(),
            "rows": [asdict(row) for row in self.rows],
            "break_even": [asdict(even) for even in self.break_even],
        }

    def header(self) -> list[str]:
        """Return the names of the columns of ``cells``."""
        return header(self.facts.metric)

    def cells(self) -> list[list[str]]:
        """Return the table as people read it."""
        return [row.cells(self.facts.epochs) for row in self.rows]

    def sentences(self) -> list[str]:
        """Return the break-even and the ratios, a sentence each."""
        sentences = []
        for even in self.break_even:
            against = APPROACHES[even.against].title
            where = f"{counted(even.train_rows, 'training row')}: " if len(self.facts.fractions) > 1 else ""
            paid = (
                "the cache never pays for itself" if even.heads is None
                else f"the extraction has paid for itself with head number {even.heads}"
            )  # fmt: skip
            sentences.append(
                f"{where}against {against}, {paid}; {counted(self.facts.epochs, 'epoch')}, extraction included, are "
                f"{ratio_text(even.first)} as fast, each further head {ratio_text(even.further)}"
            )
        return sentences

    @property
    def notes(self) -> list[str]:
        """Return what one has to know to read the table."""
        facts = self.facts
        splits = ", ".join(f"{rows:,} {name}" for name, rows in facts.splits.items())
        on_gpu = any(row.memory.device is not None for row in self.rows)
        memory = "memory on the GPU" if on_gpu else "resident memory, less that of Python and its libraries"
        notes = [
            f"{counted(facts.rows, 'row')} ({counted(facts.unique, 'different text')}): {splits}; "
            f"{facts.task}, {facts.outputs} outputs; {facts.model}; head {facts.head}; {facts.device}, "
            f"{facts.threads} threads; seeds {', '.join(map(str, facts.seeds))}.",
            f"Extraction of all rows took {seconds_text(self.extraction.seconds)}; a row of the table is charged "
            "for its training and validation texts. Loading the model and judging the test rows are charged to nobody.",
            f"An epoch includes its validation pass. Each measurement ran in a process of its own; peak memory is "
            f"{memory}.",
            f"The best epoch is the one of the best validation {facts.metric}; its weights are judged on test. "
            "Intervals are 95 % bootstrap intervals over the test rows, paired for differences.",
        ]
        heads = [row.head_memory for row in self.rows if row.head_memory is not None]
        if heads:
            peak = memory_text(max(heads))
            notes.append(f"The cached way's peak is that of its extraction; a head on the cache takes {peak}.")
        if facts.adjusted:
            notes.append(
                "The extraction was interrupted and gone on with: its time is that of the rest, in proportion."
            )
        return notes

    def to_text(self, table: Callable[[list[list[str]], list[str]], str]) -> str:
        """Lay it out for a terminal, by a function (rows, header) -> text."""
        below = [*self.sentences(), "", *self.notes]
        return "\n".join([table(self.cells(), self.header()), "", *map(shown, below)])

    def to_markdown(self) -> str:
        """Lay it out as Markdown, with the recipes."""
        columns = self.header()
        lines = ["# Cached features against training with the backbone in the loop", ""]
        lines += ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in self.cells()]
        lines += ["", *(f"- {sentence}." for sentence in self.sentences()), "", *(f"{note}\n" for note in self.notes)]
        used = {row.approach for row in self.rows}
        recipes = [f"- **{way.title}.** {way.recipe}" for name, way in APPROACHES.items() if name in used]
        return "\n".join([*lines, "## Recipes", "", *recipes]) + "\n"

    def plot(self, file: Path | str) -> None:
        """Draw time and test metric into an SVG or PNG file. Raises ``MissingExtraError`` without matplotlib."""
        try:
            from embedcache.compare.plot import draw
        except ImportError:
            raise MissingExtraError("the plot", "matplotlib", "report") from None
        draw(self.facts, self.rows, Path(file))
