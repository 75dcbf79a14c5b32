"""Verifies signed URLs of Tollgate without the database: docs/signed-urls.md defines the form, vectors.json tests this."""

import base64
import hmac
import ipaddress
import json
import re

ORIGIN = re.compile(
    r"(https?)://((?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]))(:[1-9][0-9]{0,4})?", re.IGNORECASE | re.ASCII
)
METHOD, TIME, TEXT = r"[A-Z]{1,16}", r"[1-9][0-9]{0,11}", r"[A-Za-z0-9_-]+"
FORMS = {"exp": TIME, "nbf": TIME, "key": TEXT, "sig": r"[A-Za-z0-9_-]{43}", "methods": rf"{METHOD}(\.{METHOD}){{0,8}}"}
FORMS |= {"prefix": r"[1-9][0-9]{0,3}", "net": r"([0-9a-f]{8}|[0-9a-f]{32})-[0-9]{1,3}", "once": r"[0-9a-f]{32}"}
FORMS |= {"sub": TEXT, "headers": TEXT}


def normalised(text):
    plain = r"[A-Za-z0-9._~-]"
    escape = re.compile(r"%([0-9A-Fa-f]{2})|[^A-Za-z0-9._~!$&'()*+,;=:@/?%-]")
    code = lambda match: int(match[1], 16) if match[1] else ord(match[0])
    return escape.sub(lambda m: chr(code(m)) if re.fullmatch(plain, chr(code(m))) else f"%{code(m):02X}", text)


def text_of(value):
    return base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode()


def verify(url, method, client, now, keys):
    """Returns a code, and what was signed: "subject" and "headers", which the response must have.

    url: absolute, as the client sent it. client: its address. now: seconds since 1970. keys: key id -> exported key.
    """
    url, _, query = url.partition("?")
    origin = ORIGIN.match(url)
    path = url[origin.end() :] if origin else ""
    whole = path + "?" + query
    if not origin or len(url) + len(query) >= 8192 or path[:1] not in ("", "/") or re.search(r"[^!-~]|[\\#]", whole):
        return "MALFORMED", {}
    if re.search(r"%(?![0-9A-Fa-f]{2})|%00", whole):
        return "MALFORMED", {}
    scheme, host, port = (part.lower() for part in origin.groups(""))
    path = normalised(path) or "/"
    parts = [part for part in normalised(query).split("&") if part]
    ours = [part for part in parts if part.startswith("tgu_")]
    theirs = sorted((part for part in parts if part not in ours), key=lambda part: part.partition("=")[0])
    given = dict(part[4:].partition("=")[::2] for part in ours)
    well_formed = all(re.fullmatch(FORMS.get(name, "(?!)"), value) for name, value in given.items())
    if len(given) < len(ours) or not well_formed or not given.keys() >= {"exp", "key", "methods", "sig"}:
        return "MALFORMED", {}
    if re.search(r"/\.\.?(?:;|%3B|/|$)", path):
        return "MALFORMED", {}
    if given["key"] not in keys:
        return "UNKNOWN_KEY", {}

    length = int(given.get("prefix", 0))
    if path[length - 1 : length] != "/":
        length = 0
    port = "" if (scheme, port) in (("http", ":80"), ("https", ":443")) else port
    signed = sorted(part for part in ours if not part.startswith("tgu_sig="))
    lines = ["tollgate-url-1", f"{scheme}://{host}{port}", path[:length] or path, "&".join(theirs), "&".join(signed)]
    key = base64.urlsafe_b64decode(keys[given["key"]] + "=")
    mac = hmac.digest(key, "\n".join(lines).encode(), "sha256")
    if not hmac.compare_digest(base64.urlsafe_b64encode(mac).decode().rstrip("="), given["sig"]):
        return "BAD_SIGNATURE", {}

    granted = {"subject": text_of(given["sub"]) if "sub" in given else None}
    granted["headers"] = json.loads(text_of(given["headers"])) if "headers" in given else {}
    if now >= int(given["exp"]):
        return "EXPIRED", granted
    if now < int(given.get("nbf", 0)):
        return "NOT_YET_VALID", granted
    if length and re.search("[%;]", path[length:]):
        return "PATH_NOT_ALLOWED", granted
    if method not in given["methods"].split("."):
        return "METHOD_NOT_ALLOWED", granted
    if "net" in given:
        digits, bits = given["net"].split("-")
        network = ipaddress.ip_network((bytes.fromhex(digits), int(bits)))
        address = ipaddress.ip_address(client) if client else None
        if address is None or (getattr(address, "ipv4_mapped", None) or address) not in network:
            return "IP_NOT_ALLOWED", granted
    # Only the database can count uses.
    return ("SINGLE_USE" if "once" in given else "VALID"), granted
