"""The application as a deployment of Ray Serve: replicas, each a process with the model, behind Ray's proxies.

To Ray, a WebSocket is a request that lasts: it stays with its replica, and the replica's load is how many it has. Each
replica has the queue of its own process, and there is no other one.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ray import serve  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
from ray.serve.config import AutoscalingConfig  # pyright: ignore[reportMissingImports]
from starlette.applications import Starlette

from .access import Access
from .app import LiveApp
from .model import ServedModel
from .ray_router import FewestClients
from .replicas import Replicas
from .settings import MAX_CONNECTIONS, ServeSettings


WATCH_SECONDS = 2.0  # how often a replica looks whether its application is being deleted
HEALTH_SECONDS = 2.0  # how often Ray looks whether a replica lives
GRACE_SECONDS = 30.0  # beyond the longest stream, what a replica that is not needed any more has to end


def live_application(
    load: Callable[[], ServedModel], settings: ServeSettings, access: Access, replicas: Replicas
) -> serve.Application:
    """
    Return what `ray.serve.run` runs.

    Args:
        load: Loads the model; called in the process of each replica, to which it is pickled.
        settings: What each replica allows.
        access: Who may use them.
        replicas: How many there are.
    """
    return serve.deployment(serve.ingress()(LiveReplica), **deployment_options(settings, replicas)).bind(
        load, settings, access
    )


def deployment_options(settings: ServeSettings, replicas: Replicas) -> dict[str, Any]:
    """Return the options of the deployment."""
    options: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        # A viewer who waits should not wait long for another replica; one that idles for a while is let go.
        autoscaling = AutoscalingConfig(
            min_replicas=replicas.least,
            max_replicas=replicas.most,
            target_ongoing_requests=settings.max_sessions,
            metrics_interval_s=1.0,
            look_back_period_s=5.0,
            upscale_delay_s=2.0,
            downscale_delay_s=300.0,
        )
        options = {"autoscaling_config": autoscaling}
    return {
        **options,
        "name": "live",
        # Requests for the page are beside the connections, whose number the application itself limits.
        "max_ongoing_requests": 2 * MAX_CONNECTIONS,
        "request_router_config": {"request_router_class": FewestClients},
        "health_check_period_s": HEALTH_SECONDS,
        # A replica that is not needed any more gets no new clients, and makes the streams that it has to their end.
        "graceful_shutdown_timeout_s": 60 * settings.max_minutes + GRACE_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "ray_actor_options": {"num_gpus": replicas.num_gpus, "num_cpus": replicas.num_cpus},
    }


class LiveReplica:
    """
    One replica: a process with the model, and the application that makes streams with it.

    Args:
        load, settings, access: As [`live_application`] takes them.
    """

    def __init__(self, load: Callable[[], ServedModel], settings: ServeSettings, access: Access):
        self._live = LiveApp(load(), settings, access=access, on_failure=self._fail)
        self._tasks: set[asyncio.Task] = set()

    async def __serve_build_asgi_app__(self) -> Starlette:
        """Return the application that Ray's proxies pass requests to."""
        self._begin(self._end_with_application())
        return self._live.asgi

    def check_health(self) -> None:
        """Tell Ray whether this replica can make streams.

        Raises:
            RuntimeError: If it cannot, and is to be replaced.
        """
        if self._live.has_failed:
            raise RuntimeError("This replica can make no stream any more; its log says why.")

    def _fail(self) -> None:
        """Let the clients go: Ray replaces a replica that has failed only when it has none."""
        self._begin(self._live.close())

    async def _end_with_application(self) -> None:
        """End all streams when the application is deleted: Ray tells a replica only after its clients have gone."""
        while not await asyncio.to_thread(_is_deleted, serve.get_replica_context().app_name):
            await asyncio.sleep(WATCH_SECONDS)
        await self._live.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_deleted(name: str) -> bool:
    """Whether an application is being deleted; not, as long as Ray's controller does not answer."""
    try:
        application = serve.status().applications.get(name)
    except RayError:
        return False
    return application is not None and application.status == "DELETING"
