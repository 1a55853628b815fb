"""Names and modules that are imported when they are first used, so that commands start without torch and diffusers."""

import importlib
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


# Held while the code of a deferred module runs. A thread that runs it may need another deferred module.
_RUNNING = threading.RLock()


def lazy_attributes(package: str, modules: Mapping[str, str]) -> tuple[Callable, Callable]:
    """
    Makes the functions `__getattr__` and `__dir__` of a package (PEP 562). Names and submodules of the package are imported when
    they are first used.

    Args:
        package: Name of the package.
        modules: Module of each name.
    """

    def get_attribute(name: str):
        if name in modules:
            value = getattr(importlib.import_module(modules[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get_attribute, list_names


class DeferredModule(ModuleType):
    """Module that is listed in `sys.modules` before its code runs. The code runs when a name of the module is first used."""

    def __getattr__(self, name: str):
        # `inspect` asks all modules for names with double underscores, even while torch is being imported.
        if not name.startswith("__"):
            self._run()
        return ModuleType.__getattribute__(self, name)

    def __dir__(self) -> list[str]:
        self._run()
        return ModuleType.__dir__(self)

    def _run(self) -> None:
        importlib.import_module(self.__package__)  # a package is imported before its modules
        with _RUNNING:
            if not vars(self).pop("_deferred", False):
                return
            try:
                self.__spec__.loader.exec_module(self)
            except BaseException:
                sys.modules.pop(self.__name__, None)  # the next import begins anew
                raise
            setattr(sys.modules[self.__package__], self.__name__.rpartition(".")[2], self)
            self.__class__ = ModuleType


def defer_module(name: str, path: Path) -> None:
    """
    Lists a module in `sys.modules` without running its code.

    Args:
        name: Full name of the module.
        path: File of the module.
    """
    module = module_from_spec(spec_from_file_location(name, path))
    module.__class__ = DeferredModule
    vars(module)["_deferred"] = True
    sys.modules.setdefault(name, module)
