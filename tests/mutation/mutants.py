"""Lists the small faults that can be put into a module: each a place, a replacement, and what it is called."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
UNWRAPPED = {
    "abs", "casefold", "clamp", "clone", "copy", "detach", "double", "eval", "exp", "float", "log", "lower", "sqrt",
    "square", "strip", "upper",
}  # fmt: skip
"""Methods whose call is taken away: `x.detach()` becomes `x`. Not `cpu` and `to`, which a CPU cannot tell apart."""
KEPT_DECORATORS = {
    "abstractmethod", "classmethod", "contextmanager", "dataclass", "overload", "property", "staticmethod",
}  # fmt: skip
KEPT_KEYWORDS = {
    "encoding",
    "desc",
    "unit",
    "disable",
    "leave",
    "dynamic_ncols",
    "show_progress",
    "stacklevel",
    "strict",
}
"""Looks of progress bars; the encoding, which is UTF-8 on Linux anyhow; zip's `strict`, which only asserts."""
TALK = {"print", "say", "info", "debug"}
"""Calls that tell a person something: neither dropped nor changed. Nor are those of a progress `bar`."""
TYPING = {
    "Annotated",
    "Callable",
    "Literal",
    "Mapping",
    "NDArray",
    "Sequence",
    "TypeVar",
    "cast",
    "dict",
    "list",
    "tuple",
}


@dataclass(frozen=True)
class Mutant:
    """One fault. start, end: (line from 1, column in bytes from 0)."""

    module: str
    start: tuple[int, int]
    end: tuple[int, int]
    kind: str
    before: str
    after: str

    @property
    def change(self) -> str:
        return f"{self.kind}: {self.before} -> {self.after}"

    @property
    def name(self) -> str:
        return f"{self.module}:{self.start[0]}:{self.start[1]} {self.change}"

    def apply(self, source: str) -> str:
        lines = source.encode().splitlines(keepends=True)
        (first, left), (last, right) = self.start, self.end
        head, tail = lines[first - 1][:left], lines[last - 1][right:]
        return b"".join([*lines[: first - 1], head + self.after.encode() + tail, *lines[last:]]).decode()


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of the source; a few do not parse."""
    found = {mutant.name: mutant for mutant in _walk(module, ast.parse(source))}
    return sorted(found.values(), key=lambda m: (m.start, m.end, m.name))


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _walk(module: str, node: ast.AST) -> Iterator[Mutant]:
    """Not of annotations, types, errors' wording, texts with values in them, and what is said to a person."""
    for kind, target, after in _changes(node):
        left = target.col_offset - (kind == "dropped decorator")  # the @ belongs to it
        yield Mutant(
            module, (target.lineno, left), (target.end_lineno or 0, target.end_col_offset or 0),
            kind, ast.unparse(target), after,
        )  # fmt: skip
    if isinstance(node, ast.JoinedStr | ast.Raise) or (isinstance(node, ast.Call) and _is_talk(node)):
        return
    if isinstance(node, ast.Subscript) and _last_name(node.value) in TYPING:
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.keyword) and node.arg in KEPT_KEYWORDS:
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or (isinstance(node, ast.Call) and _called(node).endswith("Error")):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(module, child)


Change = tuple[str, "ast.expr | ast.stmt", str]


def _changes(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.stmt):
        yield from _of_statement(node)
    if isinstance(node, ast.expr):
        yield from _of_expression(node)
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "negated condition", node.test, f"(not ({ast.unparse(node.test)}))"
    if isinstance(node, ast.comprehension):
        for condition in node.ifs:
            yield "dropped filter", condition, "True"
    if isinstance(node, ast.With):
        for item in node.items:
            if "no_grad" in ast.unparse(item.context_expr):
                yield "gradients recorded", item.context_expr, "torch.enable_grad()"
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        for decorator in node.decorator_list:
            if _called(decorator) not in KEPT_DECORATORS:
                yield "dropped decorator", decorator, ""


def _of_statement(node: ast.stmt) -> Iterator[Change]:
    if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "returned None", node, "return None"
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not _is_talk(node.value):
        yield "dropped call", node, "pass"
    elif isinstance(node, ast.Raise | ast.Assert | ast.Delete | ast.AugAssign) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    ):
        yield "dropped statement", node, "pass"
    elif isinstance(node, ast.Break | ast.Continue):
        yield "swapped jump", node, "continue" if isinstance(node, ast.Break) else "break"
    if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield "swapped arithmetic", node, ast.unparse(_with(node, op=ARITHMETIC[type(node.op)]()))


def _of_expression(node: ast.expr) -> Iterator[Change]:
    if isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            for other in COMPARISONS[type(op)]:
                ops = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                yield "swapped comparison", node, f"({ast.unparse(_with(node, ops=ops))})"
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield "swapped arithmetic", node, f"({ast.unparse(_with(node, op=ARITHMETIC[type(node.op)]()))})"
    elif isinstance(node, ast.BoolOp):
        other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "swapped and/or", node, f"({ast.unparse(_with(node, op=other_op))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield "dropped sign or not", node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "other constant", node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield from (("other constant", node, f"({node.value + step!r})") for step in (1, -1))
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[Change]:
    if _called(node).endswith("Error"):
        return
    for place, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in KEPT_KEYWORDS:
            yield "dropped argument", node, ast.unparse(_with(node, keywords=_without(node.keywords, place)))
    for place in range(len(node.args) - 1):
        args = list(node.args)
        args[place], args[place + 1] = args[place + 1], args[place]
        if ast.unparse(args[place]) != ast.unparse(args[place + 1]):
            yield "swapped arguments", node, ast.unparse(_with(node, args=args))
    if isinstance(node.func, ast.Attribute) and node.func.attr in UNWRAPPED:
        yield "dropped method", node, f"({ast.unparse(node.func.value)})"


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _without(values: list[ast.keyword], place: int) -> list[ast.keyword]:
    return [*values[:place], *values[place + 1 :]]


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_talk(node: ast.Call) -> bool:
    return _called(node) in TALK or (isinstance(node.func, ast.Attribute) and _last_name(node.func.value) == "bar")


def _called(node: ast.AST) -> str:
    return _last_name(node.func if isinstance(node, ast.Call) else node)


def sample(mutants: Mapping[str, list[Mutant]], lines: Mapping[str, int], seed: int) -> Iterator[Mutant]:
    """Mutants at random, every module in proportion to its lines; the first N are a sample for any N.

    A golden-ratio sequence steps through all lines, so that modules are met evenly, and a place in it decides the
    module; the mutant is any of those not drawn yet.
    """
    rng = random.Random(seed)
    left = {module: rng.sample(found, len(found)) for module, found in sorted(mutants.items()) if found}
    total, place = sum(lines[module] for module in left), rng.random()
    while any(left.values()):
        place = (place + (5**0.5 - 1) / 2) % 1
        reached = 0.0
        for module, rest in left.items():
            reached += lines[module] / total
            if place < reached:
                if rest:
                    yield rest.pop()
                break
