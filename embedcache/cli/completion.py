"""completion, and what the shell is told to complete beside the names of options and their choices."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

_MARKERS = {
    "cache": ("manifest.json",), "parts": ("manifest.json",), "run": ("config.json",),
    "folder": ("sweep.json", "audit.json"), "source": ("manifest.json", "config.json"),
}  # fmt: skip
"""Arguments that are folders of ours, and the files by which these are known."""


class Folder(click.Path):
    """A folder of ours: completed to those that begin like what was typed, else to any folder."""

    def __init__(self, markers: tuple[str, ...]) -> None:
        super().__init__()
        self._markers = markers

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the folders that are what the argument asks for; where there is none, the shell lists folders."""
        import os

        above, start = os.path.split(incomplete)
        try:
            names = sorted(name for name in os.listdir(above or ".") if name.startswith(start))
        except OSError:
            names = []
        paths = [os.path.join(above, name) for name in names]
        ours = [path for path in paths if any(os.path.isfile(os.path.join(path, file)) for file in self._markers)]
        return [CompletionItem(path) for path in ours] or [CompletionItem(incomplete, type="dir")]


def complete_more(command: click.Command) -> None:
    """Have the shell complete a command's folders too."""
    for parameter in command.params:
        if isinstance(parameter.type, click.Path) and parameter.name in _MARKERS:
            parameter.type = Folder(_MARKERS[parameter.name])


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what SHELL needs to complete commands, options, their values, and caches, runs and sweeps.

    \b
    bash   eval "$(embedcache completion bash)"           in ~/.bashrc
    zsh    eval "$(embedcache completion zsh)"            in ~/.zshrc
    fish   embedcache completion fish | source            in ~/.config/fish/config.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    root = click.get_current_context().find_root()
    click.echo(made(root.command, {}, "embedcache", "_EMBEDCACHE_COMPLETE").source())


COMMANDS = (completion,)
