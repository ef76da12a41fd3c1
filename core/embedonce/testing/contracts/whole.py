"""The base class of the contracts. It raises an error if a subclass replaces or removes a standard test."""

from __future__ import annotations

from typing import Any, ClassVar


class Contract:
    """Base class of the contracts. It rejects a subclass that defines a method with the name of a standard test."""

    standard_tests: ClassVar[dict[str, Any]] = {}
    """Standard tests of the contract, by name; :func:`register_standard_tests` sets them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        replaced = _find_replaced_tests(cls)
        if replaced:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(replaced)}: standard tests must not be overridden. "
                "Add your own tests under other names, or declare fewer capabilities"
            )

    def test_no_standard_test_is_replaced(self) -> None:
        """Check again that no standard test was replaced, because a class can change after it was made."""
        replaced = _find_replaced_tests(type(self))
        assert not replaced, f"standard tests were replaced or removed: {', '.join(replaced)}"
        assert self.standard_tests, (
            "this class is not a contract: subclass BackendContract, ReadOnlyContract, ProviderContract, "
            "ImporterContract or NormalizerContract"
        )


def _find_replaced_tests(cls: type[Contract]) -> list[str]:
    return [name for name, test in cls.standard_tests.items() if getattr(cls, name, None) is not test]


def register_standard_tests(contract: type[Contract]) -> type[Contract]:
    """Record the tests of a contract in ``standard_tests``, so that :class:`Contract` can protect them."""
    contract.standard_tests = {name: getattr(contract, name) for name in dir(contract) if name.startswith("test_")}
    return contract
