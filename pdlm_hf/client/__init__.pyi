from .captions import CaptionClient as CaptionClient
from .chat import ChatClient as ChatClient
from .chat import Reply as Reply
from .chat import ReplyCache as ReplyCache
from .chat import key_in as key_in
from .chat import public_url as public_url
