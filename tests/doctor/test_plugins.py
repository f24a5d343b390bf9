from qvlm_plugin import builtin, plugins
from qvlm_plugin.doctor.plugins import check_plugins
from qvlm_plugin.hooks import hookimpl


class Faulty:
    @hookimpl
    def qvlm_kernels(self):
        raise LookupError("nothing")


def test_plugins_are_listed_and_failing_ones_reported(monkeypatch):
    manager = plugins.create_manager(builtin)
    manager.register(Faulty(), "faulty of package some")
    monkeypatch.setattr(plugins, "plugin_manager", lambda: manager)
    provided, complaint = check_plugins()
    assert provided.status == "ok" and "qvlm_jacobian" in provided.message and "int4" in provided.message
    assert complaint.status == "warn" and "faulty of package some" in complaint.message and complaint.remedy
