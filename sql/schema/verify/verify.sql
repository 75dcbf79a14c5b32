-- Verification and the context it sets. Written in Rust: one index probe, no SPI, nothing written.

CREATE FUNCTION tollgate.verify_api_token(token text, required_scopes text[] DEFAULT NULL, client_ip inet DEFAULT NULL)
    RETURNS tollgate.verification
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'verify_api_token';
COMMENT ON FUNCTION tollgate.verify_api_token(text, text[], inet) IS
    'Verifies a token: always one row, with valid and code; never raises for a bad token, takes no row lock, writes nothing';

CREATE FUNCTION tollgate.verify_api_token_hash(token_hash bytea, required_scopes text[] DEFAULT NULL, client_ip inet DEFAULT NULL)
    RETURNS tollgate.verification
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'verify_api_token_hash';
COMMENT ON FUNCTION tollgate.verify_api_token_hash(bytea, text[], inet) IS
    'Verifies a token by the SHA-256 digest of its plaintext (32 bytes), for callers that do not send the token itself';

CREATE FUNCTION tollgate.authenticate(token text, required_scopes text[] DEFAULT NULL, client_ip inet DEFAULT NULL)
    RETURNS tollgate.verification
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'authenticate';
COMMENT ON FUNCTION tollgate.authenticate(text, text[], inet) IS
    'Verifies a token and makes it the identity of this transaction; raises 28000 when it is refused, 42501 when it lacks a required scope, 53400 when it is over its limit, 25001 when the transaction has another identity';

CREATE FUNCTION tollgate.token_has_scope(token text, scope text, client_ip inet DEFAULT NULL) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'presented_token_has_scope';
COMMENT ON FUNCTION tollgate.token_has_scope(text, text, inet) IS
    'Whether a presented token is valid and grants a scope. It is not counted as a use of the token, but failed attempts count and outcomes are logged as for verify_api_token';

CREATE FUNCTION tollgate.last_refusal() RETURNS jsonb
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'last_refusal';
COMMENT ON FUNCTION tollgate.last_refusal() IS
    'Why the last verification of this session was refused: {"code": …, "reason": … if malformed, "missing_scopes": […], "retry_after": seconds}; NULL if it was not refused. The detail of an error of authenticate is the same';

CREATE FUNCTION tollgate.client_ip_from(
    forwarded       text,
    trusted_proxies cidr[] DEFAULT '{127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,169.254.0.0/16,::1/128,fc00::/7,fe80::/10}'
) RETURNS inet
    LANGUAGE c IMMUTABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'client_ip_from';
COMMENT ON FUNCTION tollgate.client_ip_from(text, cidr[]) IS
    'The client''s address from an X-Forwarded-For list or a single address: the last one that is not a trusted proxy, the first if all are; NULL if that is not an address. Never raises';

CREATE FUNCTION tollgate.token_has_scope(scope text) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'context_has_scope';
COMMENT ON FUNCTION tollgate.token_has_scope(text) IS
    'Whether the authenticated token grants a scope; false without one. For row-level-security policies';

CREATE FUNCTION tollgate.token_has_any_scope(scopes text[]) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'context_has_any_scope';
COMMENT ON FUNCTION tollgate.token_has_any_scope(text[]) IS
    'Whether the authenticated token grants at least one of the scopes; false without one';

CREATE FUNCTION tollgate.token_has_all_scopes(scopes text[]) RETURNS boolean
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'context_has_all_scopes';
COMMENT ON FUNCTION tollgate.token_has_all_scopes(text[]) IS
    'Whether the authenticated token grants each of the scopes; false without one, and for an empty or NULL list';

CREATE FUNCTION tollgate.require_scope(scope text) RETURNS void
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'require_scope';
COMMENT ON FUNCTION tollgate.require_scope(text) IS
    'Raises 42501 unless the authenticated token grants the scope';

CREATE FUNCTION tollgate.current_token_id() RETURNS uuid
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'current_token_id';
COMMENT ON FUNCTION tollgate.current_token_id() IS 'Id of the authenticated token; NULL without one';

CREATE FUNCTION tollgate.current_user_id() RETURNS text
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'current_user_id';
COMMENT ON FUNCTION tollgate.current_user_id() IS 'User of the authenticated token; NULL without one';

CREATE FUNCTION tollgate.current_scopes() RETURNS text[]
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'current_scopes';
COMMENT ON FUNCTION tollgate.current_scopes() IS 'Scopes of the authenticated token; NULL without one';

CREATE FUNCTION tollgate.admit_event_reader(token_hash bytea, client_ip inet DEFAULT NULL, OUT code text, OUT token_id uuid)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    bound tollgate.api_tokens;
BEGIN
    SELECT v.code, v.token_id INTO code, token_id FROM tollgate.verify_api_token_hash($1, '{tollgate:events}', $2) v;
    IF code <> 'RATE_LIMITED' OR token_id IS NOT NULL THEN
        RETURN;
    END IF;
    -- The address has too many failed attempts, which may be those of a proxy in front of many readers: a valid token
    -- is still accepted.
    SELECT v.code, v.token_id INTO code, token_id FROM tollgate.verify_api_token_hash($1, '{tollgate:events}', NULL) v;
    IF code = 'IP_NOT_ALLOWED' THEN
        -- It was called without the address, and everything but the address and the scope was checked.
        SELECT t.* INTO bound FROM tollgate.api_tokens t WHERE t.token_hash = $1 AND $2 <<= ANY (t.allowed_ips);
        IF FOUND THEN
            code := CASE WHEN tollgate.scope_grants(bound.scopes, 'tollgate:events') THEN 'VALID' ELSE 'INSUFFICIENT_SCOPE' END;
            token_id := bound.id;
        END IF;
    END IF;
    IF code IN ('NOT_FOUND', 'MALFORMED') THEN
        code := 'RATE_LIMITED';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.admit_event_reader(bytea, inet) IS
    'Verifies that a token, by its sha256 digest, may read events over HTTP: it needs the scope tollgate:events; returns the code, and the token''s id. Failed attempts count against the address, but those of other clients do not block a valid token';
