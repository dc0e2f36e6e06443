"""Results of the pipeline lab in which everything came as predicted, for its tests."""

from dataclasses import replace
from functools import cached_property

from stated import Stated, machine

from labs import load
from labs.lab import configure
from labs.pipeline import model, stage_times
from labs.pipeline.config import MODELS
from labs.pipeline.running import VIRTUAL

LAB = load("pipeline")
QUICK = configure(LAB, "quick")


def constants():
    stated = machine()
    more = {"gloo_message_s": 1e-4, "gloo_s_per_byte": 5e-10}
    return replace(stated, constants={**stated.constants, **more})


class Predicted(Stated):
    """Results whose predictions are the lab's."""

    @cached_property
    def of_lab(self):
        return {(p.variant, p.key): p.value for p in LAB.predict(self.config, self.machine)}

    def predicted(self, variant, key="time_s"):
        return self.of_lab.get((variant, key))


def as_predicted(config=QUICK, counts=None, **times):
    """Results in which everything came as predicted, and stages took what the formulas say."""
    host = constants()
    stated = LAB.predict(config, host)
    found = {v.address: 0.5 for v in LAB.variants(config) if v.group == stage_times.GROUP}
    found |= {each.variant: each.value for each in stated if each.key == "time_s"}
    values = {
        (each.variant, each.key): each.value for each in stated if each.variant and each.key != "time_s"
    }
    for group in MODELS:
        for count in stage_times.cuts(config):
            durations = model.stage_durations(config, host, group, count)
            for kind in stage_times.KINDS:
                for stage, seconds in enumerate(getattr(durations, kind)):
                    values[f"{stage_times.GROUP}/{group}", f"{stage_times.key(count, stage, kind)}_s"] = (
                        seconds
                    )
    for group, ranks in (*((each, config.stages) for each in MODELS), (VIRTUAL, config.ranks)):
        for name in config.names(ranks):
            from parallel.schedules import peak_activations

            for rank, held in enumerate(peak_activations(config.schedule_of(name, ranks)).tolist()):
                values[f"{group}/{name}", f"rank{rank}_in_flight"] = held
    values |= counts or {}
    found |= {name.replace("__", "/"): seconds for name, seconds in times.items()}
    return Predicted(config, host, {"default": found}, values=values)
