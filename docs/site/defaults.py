"""Has the reference show what a caller sees, where the code has a name of its own.

* A default that is a constant of reqtable is shown by its value: `limit: int = 65536` for `limit: int = LIMIT_BYTES`.
* A method that the class takes from elsewhere (`send = Base._send`) is shown as a method, with its parameters.
* A property that another decorator makes (`@_Shown`) is shown as a property.
"""

from __future__ import annotations

from typing import Any

from griffe import Attribute, Class, Expr, Extension, Function, GriffeLoader, Module, Object

_PROPERTIES = {"_Shown"}


class Defaults(Extension):
    """Puts values, methods and properties in the place of names."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """Mend the objects of a package, once all of its modules are known."""
        if pkg.path == "reqtable":
            self._mend(pkg, loader)

    def _mend(self, thing: Object, loader: GriffeLoader) -> None:
        for each in list(thing.members.values()):
            if isinstance(each, Module | Class):
                self._mend(each, loader)
                for parameter in each.parameters if isinstance(each, Class) else ():
                    parameter.default = _shown(parameter.default, loader)
            elif isinstance(each, Function):
                if _PROPERTIES & {str(decorator.value) for decorator in each.decorators}:
                    thing.set_member(each.name, _property(each))
                for parameter in each.parameters:
                    parameter.default = _shown(parameter.default, loader)
            elif isinstance(each, Attribute) and thing.is_class:
                meant = _meant(each.value, loader)
                if isinstance(meant, Function):
                    thing.set_member(each.name, _method(each, meant))
                else:
                    each.value = _shown(each.value, loader)


def _meant(value: Any, loader: GriffeLoader) -> Object | None:
    """Return the object of reqtable that a name stands for; None if it is another expression."""
    path = value.canonical_path if isinstance(value, Expr) else ""
    try:
        return loader.modules_collection[path] if path.startswith("reqtable.") else None
    except KeyError:
        return None


def _shown(value: Any, loader: GriffeLoader) -> Any:
    """Return what to show for a default: the value of a constant. A want is shown as the call that makes it."""
    meant = _meant(value, loader)
    if not isinstance(meant, Attribute) or not meant.name.isupper() or meant.value is None:
        return value
    return str(meant.value).lower() if str(meant.value).endswith("()") else meant.value


def _property(function: Function) -> Attribute:
    shown = Attribute(function.name, lineno=function.lineno, annotation=function.returns, docstring=function.docstring)
    shown.labels.add("property")
    return shown


def _method(attribute: Attribute, meant: Function) -> Function:
    return Function(
        attribute.name,
        lineno=attribute.lineno,
        parameters=meant.parameters,
        returns=meant.returns,
        docstring=attribute.docstring,
    )
