-- What the HTTP API (capability gateway) asks of credentials: many at once, and to act for the one that it was given.

CREATE FUNCTION tollgate.verify_tokens(
    tokens          text[],
    required_scopes text[] DEFAULT NULL,
    client_ips      inet[] DEFAULT NULL,
    audiences       text[] DEFAULT NULL
) RETURNS SETOF tollgate.verification
    LANGUAGE c VOLATILE PARALLEL UNSAFE ROWS 10
    AS 'MODULE_PATHNAME', 'verify_tokens';
COMMENT ON FUNCTION tollgate.verify_tokens(text[], text[], inet[], text[]) IS
    'Verifies up to 1,000 API tokens and signed tokens, each with its own required scopes (one text, joined by spaces), client address and audience; one row for each, in their order. Each is verified and counted as by verify_api_token or verify_access_token; never raises for a bad one';

CREATE FUNCTION tollgate.act_for(credential text, scope text, client_ip inet) RETURNS tollgate.verification
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    caller tollgate.verification;
BEGIN
    -- Assignments, of which auto_explain logs no plan: it would have the credential in it.
    caller := tollgate.authenticate($1, ARRAY[$2], $3);
    IF tollgate.current_token_id() IS DISTINCT FROM caller.token_id THEN
        RAISE EXCEPTION 'the credential ended while it was used' USING ERRCODE = 'invalid_authorization_specification',
            DETAIL = jsonb_build_object('code', 'EXPIRED');
    END IF;
    RETURN caller;
END
$$;
COMMENT ON FUNCTION tollgate.act_for(text, text, inet) IS
    'Makes a presented credential of any kind, which must have the scope, the identity of the transaction; raises as authenticate does. The first step of every function that the HTTP API calls for a caller. Internal.';
