"""Register tunesmith's bottleneck adapters with peft. Importing this module is enough:

    import tunesmith.peft
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained("runs/a/model")

It is the one module of tunesmith that is imported for its effect.
"""

from tunesmith.models.adapters.bottleneck_tuner import BottleneckConfig, BottleneckModel, register

__all__ = ["BottleneckConfig", "BottleneckModel"]

register()
