"""Plain MXNet: a symbol and its parameters, which ``gluon.SymbolBlock.imports`` reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from job.errors import JobError
from job.exporting.served import Model, described
from job.exporting.trained import Trained

SYMBOL, PARAMETERS = "-symbol.json", "-0000.params"  # end the names of the two files, as Gluon's own export ends them


def write(trained: Trained, facts: Mapping[str, str], file: Path) -> None:
    """Write both files, in the run's own precision. ``file`` is the symbol; the facts are attributes of its input."""
    import mxnet as mx

    from job.exporting.graph import IMAGES, classifier

    graph = classifier(trained, trained.model.weights_dtype, guarded=True)
    nodes = json.loads(graph.symbol.tojson())
    next(node for node in nodes["nodes"] if node["name"] == IMAGES)["attrs"] = dict(facts)
    states = set(graph.symbol.list_auxiliary_states())
    arrays = {
        f"{'aux' if name in states else 'arg'}:{name}": mx.nd.array(array, dtype=array.dtype)
        for name, array in graph.arrays.items()
    }
    file.write_text(json.dumps(nodes, indent=1) + "\n", encoding="utf-8")
    mx.nd.save(str(parameters_of(file)), arrays)


def parameters_of(file: Path) -> Path:
    """The file that lies beside a symbol."""
    return file.with_name(file.name[: -len(SYMBOL)] + PARAMETERS)


def read(file: Path) -> Model:
    """Load what :func:`write` has written, as anybody would.

    Raises:
        JobError: a file is missing or damaged, or not one of this program.
    """
    import mxnet as mx

    from job.networks.others import said

    try:
        facts = mx.sym.load(str(file)).attr_dict().get("images", {})
        with warnings.catch_warnings():  # that the type of the input is not known; the graph knows it
            warnings.simplefilter("ignore")
            net = mx.gluon.SymbolBlock.imports(str(file), ["images"], str(parameters_of(file)))
        net.hybridize(static_alloc=True)
    except Exception as error:
        raise JobError(f"{file}: MXNet cannot load it: {said(error)}") from None

    def probabilities(pixels: np.ndarray) -> np.ndarray:
        try:
            found: np.ndarray = net(mx.nd.array(pixels, dtype=np.uint8)).asnumpy()
        except mx.MXNetError as error:
            raise JobError(f"{file}: MXNet cannot compute it: {said(error)}") from None
        return found

    return Model(described(facts, file), probabilities)
