"""verify.py: gives tokens to Python's libraries, as a resource server would, by the key set of their issuer.

Reads {jwks, issuer, audience, tokens: {name: {token, algorithm}}} from standard input. With `bare`, only the signature and the
form are checked, by PyJWT, with the one key of the algorithm. Prints {library: {name: the subject, true, or null if refused}}.
The reasons go to standard error.
"""

import json
import sys
import warnings

import jwt
from authlib.jose import JsonWebKey, JsonWebToken
from joserfc import jwk as joserfc_jwk
from joserfc import jwt as joserfc_jwt
from jwcrypto import jwk as jwcrypto_jwk
from jwcrypto import jwt as jwcrypto_jwt

given = json.load(sys.stdin)
jwks, issuer, audience = given["jwks"], given["issuer"], given["audience"]


def with_pyjwt(token, algorithm):
    key = jwt.PyJWKSet.from_dict(jwks)[jwt.get_unverified_header(token)["kid"]]
    required = {"require": ["exp", "iat", "iss", "aud", "sub"]}
    return jwt.decode(token, key, [algorithm], audience=audience, issuer=issuer, options=required)


def with_joserfc(token, algorithm):
    claims = joserfc_jwt.decode(token, joserfc_jwk.KeySet.import_key_set(jwks), algorithms=[algorithm]).claims
    rules = {name: {"essential": True, "value": value} for name, value in {"iss": issuer, "aud": audience}.items()}
    joserfc_jwt.JWTClaimsRegistry(exp={"essential": True}, **rules).validate(claims)
    return claims


def with_authlib(token, algorithm):
    rules = {name: {"essential": True, "value": value} for name, value in {"iss": issuer, "aud": audience}.items()}
    rules["exp"] = {"essential": True}
    claims = JsonWebToken([algorithm]).decode(token, JsonWebKey.import_key_set(jwks), claims_options=rules)
    claims.validate()
    return claims


def with_jwcrypto(token, algorithm):
    keys = jwcrypto_jwk.JWKSet.from_json(json.dumps(jwks))
    checked = {"iss": issuer, "aud": audience, "exp": None, "nbf": None}
    return json.loads(jwcrypto_jwt.JWT(jwt=token, key=keys, algs=[algorithm], check_claims=checked).claims)


def with_pyjwt_bare(token, algorithm):
    key = next(key for key in jwt.PyJWKSet.from_dict(jwks).keys if key.algorithm_name == algorithm)
    claims = {name: False for name in ("verify_exp", "verify_nbf", "verify_iat", "verify_aud", "verify_iss")}
    jwt.decode(token, key, [algorithm], options=claims)
    return {"sub": True}


def attempt(library, name, verify, token, algorithm):
    try:
        return verify(token, algorithm)["sub"]
    except Exception as error:  # noqa: BLE001 (each library has its own)
        print(library, name, repr(error)[:200], file=sys.stderr)
        return None


libraries = {"PyJWT": with_pyjwt, "joserfc": with_joserfc, "Authlib": with_authlib, "jwcrypto": with_jwcrypto}
if "bare" in sys.argv:
    libraries = {"PyJWT": with_pyjwt_bare}
warnings.simplefilter("ignore")
found = {
    library: {name: attempt(library, name, verify, **token) for name, token in given["tokens"].items()}
    for library, verify in libraries.items()
}
print(json.dumps(found))
