"""All checks of the optimizer contract, which ask the same of every optimizer, in the order of its rows."""

import contract_around  # noqa: F401 - registers its checks, as the next two do
import contract_state  # noqa: F401
import contract_step  # noqa: F401
from contract import REGISTERED, ROWS

CHECKS = {name: one for row in ROWS for name, one in REGISTERED.items() if one.row == row}
"""Name of a check to the check."""
