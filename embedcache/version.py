"""The version of this package, and those of the packages that it depends on."""

__version__ = "0.1.0"


def versions_of(*packages: str, missing: str | None = None) -> dict[str, str]:
    """Return the versions of packages by name; one that is not installed is ``missing``, or left out without it."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            if missing is not None:
                versions[name] = missing
    return versions
