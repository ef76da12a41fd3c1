"""A contract is whole or it proves nothing: no subclass may replace or remove one of its tests."""

from __future__ import annotations

from typing import Any, ClassVar


class Whole:
    """Base of the contracts. A subclass of one that has an own ``test_…`` under a standard name is refused."""

    standard_tests: ClassVar[dict[str, Any]] = {}
    """The contract's tests by name; filled in by :func:`standard`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        replaced = _replaced(cls)
        if replaced:
            raise TypeError(
                f"{cls.__name__} replaces {', '.join(replaced)}: a standard test is never overridden. "
                "Add tests of your own under other names, or declare fewer capabilities"
            )

    def test_no_standard_test_is_replaced(self) -> None:
        """The tests are the contract's own, also after what was done to the class since it was made."""
        replaced = _replaced(type(self))
        assert not replaced, f"standard tests were replaced or removed: {', '.join(replaced)}"
        assert self.standard_tests, (
            "this class is no contract: subclass BackendContract, ProviderContract or NormalizerContract"
        )


def _replaced(cls: type[Whole]) -> list[str]:
    return [name for name, test in cls.standard_tests.items() if getattr(cls, name, None) is not test]


def standard(contract: type[Whole]) -> type[Whole]:
    """Take down the tests that a contract has, for :class:`Whole` to hold its subclasses to."""
    contract.standard_tests = {name: getattr(contract, name) for name in dir(contract) if name.startswith("test_")}
    return contract
