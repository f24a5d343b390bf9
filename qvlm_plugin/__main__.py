"""``python -m qvlm_plugin``: the ``qvlm`` command."""

from qvlm_plugin.cli import app

app(prog_name="qvlm")
