"""gRPC over TLS 1.3 with both sides known from the roster. Messages are opaque bytes in our own encoding.

BoringSSL inside gRPC offers TLS 1.2 by default. A cipher suite that no ECDSA certificate can serve leaves only the
suites of 1.3; it must be in the environment before grpc is imported, and every call checks the outcome.
"""

import os

os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
# Children are forked only to exec another program at once; gRPC need not prepare for more, nor warn.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
