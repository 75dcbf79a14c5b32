-- Token exchange (RFC 8693), introspection (RFC 7662) and revocation (RFC 7009): one face each for every kind of credential.
-- Exchanging and introspecting store nothing, so they work on standbys (extension/src/access/exchange.rs, introspect.rs).

CREATE TYPE tollgate.exchanged_token AS (
    code              text,
    reason            text,
    access_token      text,
    jti               uuid,
    expires_at        timestamptz,
    scopes            text[],
    audience          text[],
    issued_token_type text
);
COMMENT ON TYPE tollgate.exchanged_token IS
    'The outcome of an exchange: with code VALID an access token, which is not stored, else why there is none';

CREATE FUNCTION tollgate.exchange_token(
    subject_token      text,
    subject_token_type text     DEFAULT 'urn:ietf:params:oauth:token-type:access_token',
    scopes             text[]   DEFAULT NULL,
    audience           text[]   DEFAULT NULL,
    lifetime           interval DEFAULT NULL,
    actor_token        text     DEFAULT NULL,
    actor_token_type   text     DEFAULT NULL,
    client_ip          inet     DEFAULT NULL
) RETURNS tollgate.exchanged_token
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'exchange_token';
COMMENT ON FUNCTION tollgate.exchange_token(text, text, text[], text[], interval, text, text, inet) IS
    'Issues an access token for a presented API token, access token or trusted issuer''s token (RFC 8693), and for that of an actor who acts for its user: never wider than the subject''s in scopes, audience (but for those of an acting service account), networks and time, and refused once either of the two is. Never raises for a bad token: its code is VALID, INVALID_SUBJECT, INVALID_ACTOR, ACTOR_NOT_ALLOWED, INSUFFICIENT_SCOPE, INVALID_TARGET, CHAIN_TOO_LONG or RATE_LIMITED. Stores nothing; a use of both tokens; event access_token.issued only with tollgate.audit_issue';

CREATE FUNCTION tollgate.introspect_token(token text, hint text DEFAULT NULL, client_ip inet DEFAULT NULL) RETURNS jsonb
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'introspect_token';
COMMENT ON FUNCTION tollgate.introspect_token(text, text, inet) IS
    'What a presented API token, access token or refresh token is (RFC 7662), whatever its audience; {"active": false} and no more for one that is not active. Not a use of it, but failed attempts count and are logged as for verify_api_token. The hint is not needed';

CREATE FUNCTION tollgate.is_signed_token(token text) RETURNS boolean
    LANGUAGE c IMMUTABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'is_signed_token';
COMMENT ON FUNCTION tollgate.is_signed_token(text) IS 'Whether a text has the form of a signed token. Internal.';

CREATE FUNCTION tollgate.revoke_token(token text, hint text DEFAULT NULL, reason text DEFAULT NULL, client_ip inet DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    is_ended boolean;
BEGIN
    PERFORM tollgate.without_token('hint', $2);
    -- Assignments, of which auto_explain logs no plan: it would have the token in it.
    IF tollgate.is_signed_token($1) THEN
        is_ended := tollgate.revoke_access_token($1, $3, $4);
    ELSE
        is_ended := tollgate.revoke_presented_token($1, $3, $4);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_token(text, text, text, inet) IS
    'Ends a presented API token with those derived from it, an access token, or the session of a refresh token, with all that was exchanged for it (RFC 7009); nothing happens for one that is unknown or over. The hint is not needed. Failed attempts count and are logged as for verify_api_token; 53400 at an address with too many of them; events as of revoke_presented_token and revoke_access_token';
