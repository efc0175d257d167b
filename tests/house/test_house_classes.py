"""A class is abstract or final: interfaces have no code, concrete classes have no heirs."""

from __future__ import annotations

import ast

from house.tree import Source, dotted, imports, sources

PACKAGE = sources("src")
ABSTRACT = frozenset({"Protocol", "ABC", "typing.Protocol", "abc.ABC"})
MODULES = frozenset({"nn.Module", "torch.nn.Module", "Module"})


def classes(source: Source) -> list[ast.ClassDef]:
    return [node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]


def bases(node: ast.ClassDef) -> list[str]:
    """Dotted names of the bases; ``Protocol[T]`` counts as ``Protocol``."""
    plain = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
    return [dotted(base) for base in plain]


def module_name(source: Source) -> str:
    return source.name.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def resolved(source: Source, base: str) -> str:
    """The dotted home of ``base`` as ``source`` sees it."""
    head, _, rest = base.partition(".")
    names = {name.rpartition(".")[2]: name for _, name in imports(source.tree)}
    return f"{names.get(head, f'{module_name(source)}.{head}')}{'.' + rest if rest else ''}"


def test_no_class_inherits_from_a_concrete_class_of_ours() -> None:
    ours = {f"{module_name(source)}.{node.name}": node for source in PACKAGE for node in classes(source)}
    concrete = {name for name, node in ours.items() if not ABSTRACT & set(bases(node))}
    assert concrete
    assert not [
        f"{source.name}:{node.lineno} {node.name} inherits from {base}"
        for source in PACKAGE
        for node in classes(source)
        for base in bases(node)
        if resolved(source, base) in concrete
    ]


def test_every_module_of_torch_is_final_or_abstract() -> None:
    assert not [
        f"{source.name}:{node.lineno} {node.name} is neither @final nor abstract"
        for source in PACKAGE
        for node in classes(source)
        if MODULES & set(bases(node))
        and not ABSTRACT & set(bases(node))
        and "final" not in [dotted(mark) for mark in node.decorator_list]
    ]


def test_mutable_class_attributes_are_absent() -> None:
    assert not [
        f"{source.name}:{statement.lineno} is shared by all instances"
        for source in PACKAGE
        for node in classes(source)
        for statement in node.body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        and isinstance(statement.value, ast.List | ast.Dict | ast.Set)
    ]
