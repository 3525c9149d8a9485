"""What hides the packages of this environment; told in words where an import fails of it. Needs nothing but Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

# As launch/shared/environment.sh leaves them out.
MODULES = "numpy mxnet horovod numba pydantic pydantic_core yaml psutil rich tensorboardX".split()
_LIBRARIES = "libmpi.so* libopen-rte.so* libopen-pal.so* libpmix.so*".split()


def hiding(python_path: str, library_path: str) -> list[str]:
    """What hides packages of this environment: ``FOLDER (of VARIABLE) holds FILE``, for folders of the two lists."""
    found = []
    for variable, folders, names in (
        ("PYTHONPATH", python_path, MODULES), ("LD_LIBRARY_PATH", library_path, _LIBRARIES),
    ):  # fmt: skip
        for folder in filter(None, folders.split(os.pathsep)):
            held = [path.name for name in names for path in Path(folder).glob(name)]
            if held and not Path(folder).resolve().is_relative_to(Path(sys.prefix).resolve()):
                found.append(f"{folder} (of {variable}) holds {held[0]}")
    return found


def remedy(found: Sequence[str]) -> str:
    """What to do about what :func:`hiding` found."""
    variables = [name for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if any(f"(of {name})" in one for one in found)]
    return f"unset {' '.join(variables)}; the launchers in launch/ leave such folders out by themselves"


def explain_imports() -> None:
    """Have an import that fails end the process in one message, where it is known what to do about it.

    For imports before :func:`job.command.run`, which tells all that comes later.
    """
    sys.excepthook = _explain


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    found = hiding(os.environ.get("PYTHONPATH", ""), os.environ.get("LD_LIBRARY_PATH", ""))
    said = next(filter(None, map(str.strip, str(error).splitlines())), kind.__name__)
    if found and issubclass(kind, Exception):
        told = f"{said}; {'; '.join(found)}, and hides what .venv holds; {remedy(found)}"
    elif isinstance(error, ModuleNotFoundError) and error.name in MODULES:
        told = f"{said} in {sys.prefix}; `make setup` installs it into .venv: source .venv/bin/activate"
    else:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {told}", file=sys.stderr, flush=True)
