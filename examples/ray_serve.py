"""FLUX.1-dev on every GPU of a Ray cluster: `serve run examples.ray_serve:app`, or `python examples/ray_serve.py`.

`jitaccel serve` does the same on one machine. docs/serving.md explains requests, limits and scaling.
"""

from jitaccel.serving.deployment import NAME, Serving, application
from jitaccel.serving.limits import Limits

app = application(
    Serving(
        model="black-forest-labs/FLUX.1-dev",
        gpus=1,  # Ray places one replica on each GPU that is free
        replicas=(1, 8),  # one more while each has over `target_ongoing` requests, one less where they idle
        target_ongoing=4,
        batch=4,
        execution="auto",  # one forward for a batch; "indexed": equal bytes whatever else is in the batch
        limits=Limits(waiting=256, seconds=120),
    )
)

if __name__ == "__main__":
    import threading

    from ray import serve

    serve.start(http_options={"host": "0.0.0.0", "port": 8000})
    serve.run(app, name=NAME, route_prefix="/")
    threading.Event().wait()
