"""ONNX, by MXNet's own exporter; read by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from job.distributed.placement import cores
from job.errors import JobError
from job.exporting.served import Model, described, input_shape
from job.exporting.trained import Trained

OPSET, IR_VERSION = 13, 8  # the newest operators that MXNet 1.9.1 translates to, and the format of their time


def write(trained: Trained, facts: Mapping[str, str], file: Path) -> None:
    """Write the model as float32: onnxruntime has no float64 convolution.

    Raises:
        JobError: ONNX, or MXNet's exporter, has no equivalent of an operator. The message names it.
    """
    import mxnet as mx
    import onnx
    from mxnet.onnx.mx2onnx._export_onnx import MXNetGraph

    from job.exporting.graph import IMAGES, PROBABILITIES, classifier

    graph = classifier(trained, "float32", guarded=False)
    shape, classes = input_shape(trained.about), len(trained.about.classes)
    arrays = {name: mx.nd.array(array, dtype="float32") for name, array in graph.arrays.items()}
    with _operators_named(MXNetGraph):
        written = MXNetGraph().create_onnx_graph_proto(
            graph.symbol,
            arrays,
            [(1, *shape)],
            [onnx.TensorProto.UINT8],
            opset_version=OPSET,
            dynamic_input_shapes=[("N", *shape)],
        )
    used = {name for node in written.node for name in node.input}
    weights = [tensor for tensor in written.initializer if tensor.name in used]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            written.node,
            written.name,
            [onnx.helper.make_tensor_value_info(IMAGES, onnx.TensorProto.UINT8, ["N", *shape])],
            [onnx.helper.make_tensor_value_info(PROBABILITIES, onnx.TensorProto.FLOAT, ["N", classes])],
            weights,
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="horovod-gluon-job",
    )
    onnx.helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString(deterministic=True))


def read(file: Path) -> Model:
    """Load a model that :func:`write` has written. It computes on the CPU, on all cores of this process.

    Raises:
        JobError: the file is damaged, or not one of this program.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's many kinds
        raise JobError(f"{file}: onnxruntime cannot load it: {_said(error)}") from None
    about = described(session.get_modelmeta().custom_metadata_map, file)

    def probabilities(pixels: np.ndarray) -> np.ndarray:
        try:
            found: np.ndarray = session.run(None, {session.get_inputs()[0].name: pixels})[0]
        except Exception as error:
            raise JobError(f"{file}: onnxruntime cannot compute it: {_said(error)}") from None
        return found

    return Model(about, probabilities)


@contextmanager
def _operators_named(exporter: Any) -> Iterator[None]:
    """Have MXNet's exporter, which calls what translates a node by this name, say which operator it stopped at."""
    translate = exporter.convert_layer

    def named(node: dict[str, Any], **options: Any) -> Any:
        try:
            return translate(node, **options)
        except Exception as error:
            raise JobError(
                f"the operator {node['op']} ({node['name']}) cannot be exported to ONNX: {_said(error)}; --format mxnet"
                " takes every network"
            ) from None

    exporter.convert_layer = staticmethod(named)
    try:
        yield
    finally:
        exporter.convert_layer = staticmethod(translate)


def _said(error: Exception) -> str:
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
