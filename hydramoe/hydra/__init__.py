"From prompts to weights of experts, and all of it in one object"

def __getattr__(name):
    "`from hydramoe.hydra import Hydra`, as the model cards of older bundles say; imported when it is first asked for"
    if name != 'Hydra': raise AttributeError(f"module 'hydramoe.hydra' has no attribute {name!r}")
    import hydramoe
    return hydramoe.Hydra
