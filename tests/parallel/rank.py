"""One rank of a parallel test: ``python -m tests.parallel.rank MODULE FUNCTION FOLDER``, started by ``run_ranks``.

Calls the function with this rank's communicator and the arguments in ``FOLDER/arguments.pickle``, and leaves what it
returns in ``FOLDER/<rank>.pickle``.
"""

import pickle
import sys
from importlib import import_module
from pathlib import Path

from job.distributed.placement import share_cores
from job.quick_import import quicken

share_cores()
quicken()

from job import command
from job.distributed.comm import connect

TIMEOUT_SECONDS = 60.0


def main() -> None:
    module, function, folder = sys.argv[1:]
    arguments = pickle.loads((Path(folder) / "arguments.pickle").read_bytes())
    comm = connect(TIMEOUT_SECONDS, subsets=True)
    result = getattr(import_module(module), function)(comm, **arguments)
    (Path(folder) / f"{comm.rank}.pickle").write_bytes(pickle.dumps(result))
    comm.close()


if __name__ == "__main__":
    command.run(main)
