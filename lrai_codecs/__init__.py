"""Bodies of HTTP into requests and answers back: what the adapters of HTTP hosts share.

A body goes `http.read` (limits, compression) → `bodies.decode` (by its content type) → the runtime
→ `bodies.encode` (by what the caller accepts). `tensors` fits values to what a model declares,
`rows` asks for many of them in parts.
"""

from lrai_codecs.bodies import decode as decode
from lrai_codecs.bodies import encode as encode
from lrai_codecs.forms import MEDIA_TYPES as MEDIA_TYPES
from lrai_codecs.forms import Form as Form
from lrai_codecs.forms import NotAcceptable as NotAcceptable
from lrai_codecs.forms import UnsupportedMediaType as UnsupportedMediaType
from lrai_codecs.http import HungUp as HungUp
from lrai_codecs.http import Later as Later
from lrai_codecs.http import PayloadTooLarge as PayloadTooLarge
from lrai_codecs.http import Reply as Reply
from lrai_codecs.http import Room as Room
from lrai_codecs.http import counted as counted
from lrai_codecs.http import failure as failure
from lrai_codecs.http import read as read
from lrai_codecs.http import respond as respond
from lrai_codecs.http import unless_gone as unless_gone
from lrai_codecs.protocol import declared as declared
from lrai_codecs.rows import in_parts as in_parts
from lrai_codecs.rows import in_turn as in_turn
from lrai_codecs.rows import rows_at_a_time as rows_at_a_time
from lrai_codecs.tensors import by_name as by_name
from lrai_codecs.tensors import dtype_of as dtype_of
from lrai_codecs.tensors import fit as fit
from lrai_codecs.tensors import text as text
