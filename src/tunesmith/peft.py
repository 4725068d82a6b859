"""``import tunesmith.peft``: from then on plain peft opens tunesmith's bottleneck adapters.

    import tunesmith.peft
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained("runs/a/model")

The one module whose import does something: it writes one kind into peft's tables, and nothing else.
"""

from tunesmith.models.adapters.bottleneck_tuner import BottleneckConfig, BottleneckModel, register

__all__ = ["BottleneckConfig", "BottleneckModel"]

register()
