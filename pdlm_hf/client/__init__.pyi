from .cache import Reply as Reply
from .cache import ReplyCache as ReplyCache
from .captions import CaptionClient as CaptionClient
from .chat import ChatClient as ChatClient
from .server import ServerClient as ServerClient
from .server import key_in as key_in
from .server import public_url as public_url
