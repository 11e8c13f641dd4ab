"""Services through the native door: what there is, and what it offers."""

from typing import Any

from aiohttp import web

from ownware_gateway.doors.native.answers import answer
from ownware_gateway.doors.native.bodies import query
from ownware_gateway.services import Services, ServiceStatus


class ServiceHandlers:
    """The handlers; `_services` is what they open onto."""

    _services: Services

    def service_routes(self, base: str) -> list[web.RouteDef]:
        """Return the routes under a path."""
        return [web.get(f"{base}/services", self.services)]

    async def services(self, request: web.Request) -> web.Response:
        """List every service, whatever its state."""
        query(request)
        return answer({"services": [_shape(item) for item in self._services.statuses()]})


def _shape(status: ServiceStatus) -> dict[str, Any]:
    """Return a service as people may see it."""
    return {
        "id": status.id,
        "description": status.settings.description,
        "source": status.source,
        "profileId": status.profile_id,
        "state": status.state,
        "error": status.error,
        "url": status.url,
        "trusted": status.settings.trusted,
        "tools": [
            {
                "name": tool.name,
                "method": tool.method,
                "path": tool.path,
                "description": tool.description,
                "readsOnly": tool.reads_only,
            }
            for tool in status.tools
        ],
        "leftOut": list(status.left_out),
    }
