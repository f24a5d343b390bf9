"""``python -m qvlm_plugin``: the ``qvlm`` command."""

from qvlm_plugin.cli import app

if __name__ == "__main__":
    app(prog_name="qvlm")
