"""How a stage runs, whatever its studies are: on Linux and macOS, by what Windows has not."""

from importlib.util import find_spec

if find_spec("fcntl") is None:
    raise SystemExit(
        "error: tumorvolume runs on Linux and macOS; on Windows use WSL (wsl --install)"
    )
