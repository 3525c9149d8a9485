"""MXNet imported quickly is MXNet: the same operators with the same results, seen in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from job import quick_import

ROOT = Path(__file__).resolve().parents[2]

LOOK = """
import json, sys
{before}
import mxnet as mx
namespaces = [name for name in sorted(sys.modules) if name.startswith("mxnet.")]
operators = {{
    name: sorted(key for key, value in vars(sys.modules[name]).items() if callable(value)) for name in namespaces
}}
x = mx.nd.array([[1, -2], [3, 4]])
data = mx.sym.var("data")
net = mx.sym.Activation(mx.sym.FullyConnected(data, num_hidden=3, name="dense"), "relu", name="out")
refusal = ""
try:
    mx.nd.FullyConnected(x, number=3)
except Exception as error:
    refusal = type(error).__name__
print(json.dumps({{
    "operators": operators,
    "nd": mx.nd.relu(x).asnumpy().tolist() + mx.nd.concat(x, x, dim=0).asnumpy().tolist() + [float(x.sum().asscalar())],
    "contrib": mx.nd.contrib.arange_like(x).asnumpy().tolist(),
    "np": mx.np.dot(mx.np.ones((2, 2)), mx.np.ones((2, 2))).tolist(),
    "sym": json.loads(net.tojson()),
    "refusal": refusal,
    "written": mx.nd.relu.__doc__ != "",
    "downloads": "urllib3" in sys.modules,
    "onnx": "onnx" in sys.modules,
    "exists": bool(mx.gluon.utils.requests.get),
}}))
"""


def look(before: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(before=before)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_without_onnx_nothing_else_is_missing() -> None:
    whole, without = (look(f"from job.quick_import import quicken; quicken(onnx={onnx})") for onnx in (True, False))
    assert (whole.pop("onnx"), without.pop("onnx")) == (True, False)
    for found in (whole, without):
        found["operators"] = {name: names for name, names in found["operators"].items() if "onnx" not in name}
    assert without == whole


def test_a_quick_import_changes_neither_operators_nor_results() -> None:
    plain, quick = look(""), look("from job.quick_import import quicken; quicken()")
    assert plain.pop("onnx") and quick.pop("onnx")
    assert (plain.pop("written"), plain.pop("downloads")) == (True, True)
    assert (quick.pop("written"), quick.pop("downloads")) == (False, False)
    assert sum(map(len, plain["operators"].values())) > 3000
    assert quick == plain


def test_an_operator_is_made_once_and_when_it_is_called() -> None:
    made = []

    def make(handle: int, name: str, function_name: str) -> Any:
        made.append((handle, name, function_name))
        return lambda *arguments, **options: (arguments, options)

    operator = quick_import._when_used(make)(7, "_contrib_twice", "twice")
    assert (made, operator.__name__) == ([], "twice")
    assert operator(1, out=2) == operator(1, out=2) == ((1,), {"out": 2})
    assert made == [(7, "_contrib_twice", "twice")]


def test_another_mxnet_is_imported_as_it_is() -> None:
    def fill(root: str, make_operators: Any) -> None:
        """Of another signature."""

    module = ModuleType("mxnet.base")
    vars(module)["_init_op_module"] = fill
    for name in quick_import._MAKERS:
        quick_import._change(module, name)
    assert vars(module)["_init_op_module"] is fill
    assert not hasattr(module, "_init_np_op_module")
