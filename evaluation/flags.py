"""How the programs that judge a run show their flags. Imports nothing that takes time, so `--help`
answers at once."""

import argparse


class Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is, then the flags, with the default of each that has one."""

    def _get_help_string(self, action):
        unset = action.default in (None, argparse.SUPPRESS) or action.default is False
        if unset or "(default" in action.help:
            return action.help
        return action.help + " (default: %(default)s)"

    def _format_action_invocation(self, action):
        """The first spelling only: the others are old names, and names in other people's guides."""
        names = action.option_strings
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{names[0]}, --no-{names[0][2:]}"
        if len(names) < 2 or "--help" in names:
            return super()._format_action_invocation(action)
        return f"{names[0]} {self._format_args(action, names[0][2:].upper())}"
