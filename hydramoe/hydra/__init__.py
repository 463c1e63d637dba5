"Prompts become weights of experts, by routers and gates; base, experts and router become one object and one directory"

def __getattr__(name):
    "`from hydramoe.hydra import Hydra`, as the model cards of older bundles say; imported when it is first asked for"
    if name != 'Hydra': raise AttributeError(f"module 'hydramoe.hydra' has no attribute {name!r}")
    import hydramoe
    return hydramoe.Hydra
