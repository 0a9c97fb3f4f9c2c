"""The playbook's form: each task has a name, one module, and what it notifies is there."""
import sys

import yaml

(play,) = yaml.safe_load(open(sys.argv[1]))
words = {"name", "args", "notify", "changed_when", "register", "when"}
handlers = {h["name"] for h in play["handlers"]}
for task in play["tasks"] + play["handlers"]:
    modules = set(task) - words
    assert len(modules) == 1 and next(iter(modules)).startswith("ansible.builtin."), task
    assert task["name"], task
    assert task.get("notify", next(iter(handlers))) in handlers, task
assert len(play["tasks"]) > 5
