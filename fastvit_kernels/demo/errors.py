"""What can go wrong in a run that is not a defect of the code."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The command line prints it as one line and ends with exit code 2."""


class Disagreement(Exception):
    """The accelerated model does not compute what the stock model computes. The command ends with exit code 1."""
