from lmmono.clients.local import LocalClient as LocalClient
from lmmono.clients.replayed import ReplayClient as ReplayClient
from lmmono.clients.server import Limits as Limits
from lmmono.clients.server import Price as Price
from lmmono.clients.server import ServerClient as ServerClient
