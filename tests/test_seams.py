"""Nobody overwrites a method of a live module; what is set from outside is a declared seam."""

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from torch import nn

import switchworks
from switchworks.model import REPLACEABLE, SEAMS
from switchworks.model.blocks import Stack
from switchworks.model.switch_ffn import SwitchFFN
from switchworks.model.transformer import SwitchTransformer

PACKAGE = Path(switchworks.__file__).parent
FILES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]

NAMES = {seam.attribute for seam in SEAMS}
PLACES = {"experts", "embedding", "head"}
"""Submodules that `REPLACEABLE` lists, by the names they have in their parents."""
BY_NAME = {
    "checkpoint/tensors.py: materialise": "a parameter or buffer read from a file",
    "adapt/lora.py: adapt": "an adapted module in the place of a plain one",
    "fast/decode.py: _traced_copy": "an opaque matrix in the copy that is traced",
    "fast/seams.py: swapped": "a seam, for a while",
    "quantise/modules.py: quantise": "a quantised module in the place of a plain one",
}
"""Functions that set an attribute whose name they compute."""
NO_MODULES = {
    "data/tokens/hugging_face.py: result.decoder",
    "generate/beam.py: layer.k",
    "generate/beam.py: layer.v",
}
"""Assignments to objects that are no modules, with names that modules have."""


def bases(trees: Iterable[ast.AST]) -> Iterator[tuple[ast.ClassDef, set[str]]]:
    for node in chain.from_iterable(map(ast.walk, trees)):
        if isinstance(node, ast.ClassDef):
            yield node, {ast.unparse(base).rpartition(".")[2] for base in node.bases}


def module_classes(trees: Mapping[str, ast.AST]) -> dict[str, ast.ClassDef]:
    """Every class of the package that is an nn.Module, by name."""
    names = {"Module", *(name for name in dir(nn) if isinstance(getattr(nn, name), type))}
    found: dict[str, ast.ClassDef] = {}
    classes = list(bases(trees.values()))
    for _ in range(4):  # as deep as the classes derive from each other
        for node, parents in classes:
            if parents & names:
                names.add(node.name)
                found[node.name] = node
    return found


@dataclass(frozen=True)
class Known:
    """What the package's modules are called, and all that is in them."""

    modules: Collection[str]
    methods: frozenset[str]
    attributes: frozenset[str]


@cache  # read when the first test needs it, not by every worker
def known() -> Known:
    trees = {file: ast.parse((PACKAGE / file).read_text("utf-8")) for file in FILES}
    modules = module_classes(trees)
    functions = {
        item.name
        for node in modules.values()
        for item in node.body
        if isinstance(item, ast.FunctionDef)
    }
    attributes = {
        target.attr
        for node in modules.values()
        for each in ast.walk(node)
        if isinstance(each, ast.Assign | ast.AnnAssign)
        for target in (each.targets if isinstance(each, ast.Assign) else [each.target])
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
    }
    methods = frozenset(functions | {"forward", "_parameters", "_buffers", "_modules"})
    of_others = {"config", "weight", "inputs", "scale"}  # names that plain objects have too
    return Known(modules, methods, frozenset(attributes - of_others))


ALLOWED = NAMES | PLACES


class Finder(ast.NodeVisitor):
    """Collects every assignment that is not allowed, as text."""

    def __init__(self, file: str) -> None:
        self.file, self.inside, self.found = file, [""], list[str]()
        self.in_module = [False]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.in_module.append(node.name in known().modules)
        self.generic_visit(node)
        self.in_module.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                self.check(each)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.check(node.target)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.check(node.target)
        self.generic_visit(node)

    def check(self, target: ast.AST) -> None:
        if not isinstance(target, ast.Attribute):
            return
        if ast.unparse(target.value) == "self":
            if self.in_module[-1] and target.attr in known().methods - {"weights"}:
                self.found.append(f"{ast.unparse(target)} = ...")
            return
        if f"{self.file}: {ast.unparse(target)}" in NO_MODULES:
            return
        if target.attr in (known().methods | known().attributes) - ALLOWED:
            self.found.append(f"{ast.unparse(target)} = ...")

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if name == "setattr" and len(node.args) == 3:
            key = node.args[1]
            if isinstance(key, ast.Constant):
                if key.value in (known().methods | known().attributes) - ALLOWED:
                    self.found.append(ast.unparse(node))
            elif f"{self.file}: {self.inside[-1]}" not in BY_NAME:
                self.found.append(ast.unparse(node))
        owner, _, method = name.rpartition(".")
        outside = not self.in_module[-1]
        if outside and owner in known().modules and method in known().methods and node.args:
            self.found.append(f"{ast.unparse(node)[:60]}")
        self.generic_visit(node)


def patches(source: str, file: str = "sample.py") -> list[str]:
    finder = Finder(file)
    finder.visit(ast.parse(source))
    return finder.found


@pytest.mark.parametrize("file", FILES)
def test_no_file_patches_a_live_module(file):
    assert patches((PACKAGE / file).read_text("utf-8"), file) == []


@pytest.mark.parametrize(
    "source",
    [
        "block.forward = faster",
        "model.decoder.blocks[0].forward = partial(faster, block)",
        "attention.qkv = joined",
        "attention.attend_out, other = a, b",
        "model.decode_step, model.prefill = one, two",
        "experts.feed_forward: Any = faster",
        "setattr(module, 'forward', faster)",
        "setattr(module, name, faster)",
        "module._parameters = local",
        "attention.d_kv //= 2",
        "attention.dropout = DropoutOfAPart(0.1)",
        "layer.router = other",
        "def faster(module, x):\n    return Attention.qkv(module, x, None)",
        "class Mine(nn.Module):\n    def f(self, block):\n        block.forward = self.g",
    ],
)
def test_the_check_sees_every_kind_of_patch(source):
    assert patches(source)


@pytest.mark.parametrize(
    "source",
    [
        "linear.matmul = faster",
        "layer.dispatcher, experts.run = sorted_, grouped",
        "stack.relative_bias = Rotary(8)",
        "model.embedding = QuantisedEmbedding(model.embedding)",
        "self.forward_count = 1",
        "parameter.data = other",
    ],
)
def test_the_check_lets_seams_and_listed_submodules_pass(source):
    assert not patches(source)


def test_every_seam_has_its_plain_form_in_its_class():
    held = {Stack: "relative_bias"}  # a module with parameters, made by the constructor
    for seam in SEAMS:
        if held.get(seam.module) != seam.attribute:
            assert seam.attribute in vars(seam.module), seam
            assert seam.attribute not in known().methods, seam


def test_a_fresh_model_has_no_seam_set(tiny_experiment):
    model = SwitchTransformer(tiny_experiment.model)
    functions = NAMES - {"relative_bias"}
    assert not [n for n, module in model.named_modules() if functions & set(vars(module))]


def test_every_replaceable_submodule_is_where_the_list_says():
    assert {kind.__name__ for kind in REPLACEABLE} == {"Linear", "Embedding", "Experts", "Router"}
    assert set(vars(SwitchFFN)) >= {"dispatcher", "reporter"}
