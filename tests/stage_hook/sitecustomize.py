"""Loaded by each Python that finds this folder on its path: makes a stage's steps slower, or one of them fail, where a test's environment asks for it."""
import importlib.abc
import importlib.util
import os
import sys
import time


class TrainFinder(importlib.abc.MetaPathFinder):
    "Changes nanochat.train as soon as it is loaded."

    def find_spec(self, name, path=None, target=None):
        if name != "nanochat.train":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            change(module)
        spec.loader.exec_module = load_and_change
        return spec


def change(train):
    "Put something before each step."
    advance = train.advance

    def advance_later(trainer, *arguments):
        if os.environ.get("STEP_ERROR") and trainer.step == 7:
            raise train.UserError("step 7 can't be done") if os.environ["STEP_ERROR"] == "UserError" else ValueError("step 7\ncan't be done")
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
        advance(trainer, *arguments)
    train.advance = advance_later


if os.environ.get("STEP_SECONDS") or os.environ.get("STEP_ERROR"):
    sys.meta_path.insert(0, TrainFinder())
