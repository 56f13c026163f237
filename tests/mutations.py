"""A module -> its mutants: small changes to its syntax tree, one at a time (for mutants.py)."""

import ast
import copy
import importlib.util
import marshal
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, Final

SWAPS: Final[dict[type[Any], type[Any]]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES: Final = {"min": "max", "any": "all", "minimum": "maximum", "argmin": "argmax"}
NAMES.update({there: here for here, there in tuple(NAMES.items())})
UNTOUCHED: Final = ("annotation", "returns", "decorator_list")
Change = tuple[str, Any, Any]
BLOCKS: Final = ("body", "orelse", "finalbody")


@dataclass
class Mutant:
    """One change: `holder.field = value`. `function` is the first line of the function it is in."""

    line: int
    before: str
    after: str
    function: int | None
    holder: ast.AST
    field: str
    value: Any


def changes(node: ast.AST) -> Iterator[Change]:
    """(field of the node, its new value, the node that the change is shown by)."""
    match node:
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                yield "ops", [*ops[:place], SWAPS[type(op)](), *ops[place + 1 :]], node
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            if not is_text(node):
                yield "op", SWAPS[type(op)](), node
        case ast.UnaryOp(op=op, operand=operand):
            yield "operand", ast.UnaryOp(op, operand), node
        case ast.Constant(value=bool() as value):
            yield "value", not value, node
        case ast.Constant(value=int() | float() as value):
            yield "value", value + 1, node
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant):
                yield "test", ast.UnaryOp(ast.Not(), test), test
        case ast.Call():
            yield from changes_of_call(node)


def statements_left_out(node: ast.AST) -> Iterator[Change]:
    """The same for the statements in a node's blocks."""
    for block in BLOCKS:
        statements = getattr(node, block, None)
        for place, each in enumerate(statements if isinstance(statements, list) else ()):
            if is_left_out(each, node):
                rest = [*statements[:place], ast.Pass(), *statements[place + 1 :]]  # type: ignore[index]
                yield block, rest, each


def changes_of_call(node: ast.Call) -> Iterator[Change]:
    """The same for a call: another function, or a keyword argument left out."""
    named = "id" if isinstance(node.func, ast.Name) else "attr"
    if other := NAMES.get(getattr(node.func, named, "")):
        func = copy.copy(node.func)
        setattr(func, named, other)
        yield "func", func, node
    if getattr(node.func, named, "")[:1].isupper():
        return  # a class's arguments have to be there
    for place, keyword in enumerate(node.keywords):
        if keyword.arg not in (None, "strict"):
            yield "keywords", node.keywords[:place] + node.keywords[place + 1 :], node


def is_left_out(statement: ast.AST, parent: ast.AST) -> bool:
    """Whether a mutant leaves this statement out."""
    match statement:
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()):
            return True
        case ast.Assign(targets=targets):
            return all(isinstance(each, ast.Attribute | ast.Subscript) for each in targets)
        case ast.Return():
            return not isinstance(parent, ast.FunctionDef)
    return isinstance(statement, ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def is_message(node: ast.AST) -> bool:
    """Whether only words of a message, cases of a type checker or `strict=True` are in there."""
    if isinstance(node, ast.keyword):
        return node.arg == "strict"
    if isinstance(node, ast.FunctionDef):
        return any(getattr(each, "id", "") == "overload" for each in node.decorator_list)
    return isinstance(node, ast.JoinedStr | ast.Raise)


def is_text(node: ast.AST) -> bool:
    """Whether texts are added, not numbers."""
    sides = [getattr(node, side, None) for side in ("left", "right")]
    return any(
        isinstance(getattr(side, "values", getattr(side, "value", None)), str | list)
        for side in sides
    )


def mutants_of(path: Path) -> tuple[ast.Module, list[Mutant]]:
    """A module's tree, and every change to it. Messages, annotations and decorators stay."""
    source = path.read_bytes()
    tree, found, lines = ast.parse(source), [], source.splitlines()

    def walk(node: ast.AST, function: int | None) -> None:
        inside = function
        if isinstance(node, ast.FunctionDef):
            inside = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        for field, value, shown in (*statements_left_out(node), *changes(node)):
            texts = spelled(lines, shown, node, field, value)
            found.append(Mutant(shown.lineno, *texts, inside, node, field, value))
        for name, child in ast.iter_fields(node):
            for each in child if isinstance(child, list) else [child]:
                if name not in UNTOUCHED and isinstance(each, ast.AST) and not is_message(each):
                    walk(each, inside if name == "body" else function)

    walk(tree, None)
    return tree, found


def spelled(
    lines: list[bytes], shown: Any, node: ast.AST, field: str, value: Any
) -> tuple[str, str]:
    """The source of a change, before and after, as one line each."""
    first, last = lines[shown.lineno - 1], lines[shown.end_lineno - 1]
    before = " ".join(b" ".join(lines[shown.lineno - 1 : shown.end_lineno]).decode().split())
    if field in BLOCKS and isinstance(shown, ast.stmt):
        return before, f"without {before}"
    old = getattr(node, field)
    setattr(node, field, value)
    new = ast.unparse(value if field == "test" else shown)
    setattr(node, field, old)
    around = first[: shown.col_offset].decode(), last[shown.end_col_offset :].decode()
    return before, " ".join((around[0] + new + around[1]).split())


class Changed(SourceFileLoader):
    """Finds one module, and gives it another code than its file has."""

    def __init__(self, module: str, path: Path, code: CodeType) -> None:
        super().__init__(module, str(path))
        self._code = code

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Where the module is from; None for any other."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_code(self, fullname: str) -> Any:
        """The changed module's code."""
        return self._code


def change(module: str, path: Path, tree: ast.Module, folder: Path) -> None:
    """Let imports of `module`, here and in processes started from here, find it as `tree`."""
    code = compile(ast.fix_missing_locations(tree), path, "exec")
    sys.meta_path.insert(0, Changed(module, path, code))
    (folder / "code").write_bytes(marshal.dumps(code))
    start = f"""
import marshal, sys
from pathlib import Path
sys.path.append({str(Path(__file__).parent)!r})
from mutations import Changed
code = marshal.loads(Path({str(folder / "code")!r}).read_bytes())
sys.meta_path.insert(0, Changed({module!r}, Path({str(path)!r}), code))
"""
    (folder / "sitecustomize.py").write_text(start)  # Python imports it when it starts
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
