"""Calls within the budget of a tenant, for tests of budgets."""

from __future__ import annotations

from typing import Any

from embedonce import Fetched
from embedonce_server.tenants import budgets


async def fetch_within_budget(*arguments: Any, **options: Any) -> Fetched:
    """Do what the server does for a request.

    Raises:
        BudgetExceeded: some texts do not fit into the budget.
        BudgetsUnavailable: the file of the budgets cannot be used.
    """
    fetched = await budgets.fetch_within_budget(*arguments, **options)
    for error in fetched.failed.values():
        if isinstance(error, budgets.BudgetExceeded | budgets.BudgetsUnavailable):
            raise error
    return fetched
