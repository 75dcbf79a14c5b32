-- The scope catalogue, and the grammar that decides what a scope grants.

CREATE TABLE tollgate.scopes (
    name        text        PRIMARY KEY,
    description text        NOT NULL,
    defined_at  timestamptz NOT NULL DEFAULT now(),
    defined_by  text        NOT NULL DEFAULT tollgate.acting_role()
);
COMMENT ON TABLE tollgate.scopes IS 'The scopes that tokens may be issued with';
SELECT pg_extension_config_dump('tollgate.scopes', '');

CREATE FUNCTION tollgate.scope_grants(granted text[], required text) RETURNS boolean
    LANGUAGE c IMMUTABLE PARALLEL SAFE STRICT
    AS 'MODULE_PATHNAME', 'scope_grants';
COMMENT ON FUNCTION tollgate.scope_grants(text[], text) IS
    'Whether any of the granted scopes grants the required one: x:* grants x: followed by anything, admin grants everything, any other scope matches exactly; a malformed scope grants nothing and is never granted';

CREATE FUNCTION tollgate.scope_is_valid(scope text) RETURNS boolean
    LANGUAGE c IMMUTABLE PARALLEL SAFE STRICT
    AS 'MODULE_PATHNAME', 'scope_is_valid';
COMMENT ON FUNCTION tollgate.scope_is_valid(text) IS
    'Whether a text is a scope: segment(:segment)*, each segment [a-z0-9][a-z0-9_.-]*, at most 128 characters, no wildcard. Internal.';

CREATE FUNCTION tollgate.define_scope(name text, description text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    before text;
BEGIN
    IF $1 IS NULL OR NOT tollgate.scope_is_valid($1) THEN
        RAISE EXCEPTION 'this is not a scope: %', tollgate.quote_redacted($1)
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'Argument: name.',
                  HINT = 'A scope is one or more segments joined by ":", each of a-z, 0-9, "_", "." and "-" and beginning with a letter or digit, at most 128 characters in all; wildcards are granted, not defined.';
    END IF;
    IF $1 ~ '[0-9a-f]{16}' THEN
        RAISE EXCEPTION 'this scope looks like a token'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: name, which has 16 hexadecimal digits in a row.',
                  HINT = 'Scopes are written to the audit log, where nothing is ever erased: choose another name. If it was a token, revoke it.';
    END IF;
    IF $1 = 'admin' THEN
        RAISE EXCEPTION 'the scope admin is built in and cannot be defined'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: name.',
                  HINT = 'Tokens may be issued with it as it is; it grants every scope.';
    END IF;
    PERFORM tollgate.without_token('description', $2);
    IF $2 IS NULL OR length($2) > 1000 THEN
        RAISE EXCEPTION 'a scope needs a description of at most 1000 characters'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: description.',
                  HINT = 'Describe in a sentence what a token with this scope may do.';
    END IF;

    -- Retry if it existed a moment ago, and was dropped since.
    LOOP
        INSERT INTO tollgate.scopes (name, description) VALUES ($1, $2) ON CONFLICT ON CONSTRAINT scopes_pkey DO NOTHING;
        IF FOUND THEN
            INSERT INTO tollgate.audit_log (event, detail)
                VALUES ('scope.defined', jsonb_build_object('scope', $1, 'description', $2));
            RETURN;
        END IF;
        SELECT s.description INTO before FROM tollgate.scopes s WHERE s.name = $1 FOR UPDATE;
        EXIT WHEN FOUND;
    END LOOP;
    UPDATE tollgate.scopes s SET description = $2 WHERE s.name = $1 AND s.description <> $2;
    IF FOUND THEN
        INSERT INTO tollgate.audit_log (event, detail)
            VALUES ('scope.defined', jsonb_build_object('scope', $1, 'description', $2, 'changes', jsonb_build_object(
                'description', jsonb_build_object('from', before, 'to', $2))));
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.define_scope(text, text) IS
    'Adds a scope to the catalogue, or changes its description; event scope.defined';

CREATE FUNCTION tollgate.drop_scope(name text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    dropped  text;
    carriers bigint;
    example  text;
BEGIN
    PERFORM tollgate.without_token('name', $1);
    -- With a snapshot older than the lock below, a token that was just issued would be invisible.
    PERFORM tollgate.check_read_committed('drop_scope cannot run', 'It may not see tokens that were just issued.', 'Call it');
    -- A transaction that issues a token holds ROW SHARE on the catalogue until commit, so after this no token is being
    -- issued.
    LOCK TABLE tollgate.scopes IN EXCLUSIVE MODE;

    DELETE FROM tollgate.scopes s WHERE s.name = $1 RETURNING s.description INTO dropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no scope %', tollgate.quote_redacted($1)
            USING ERRCODE = 'undefined_object', DETAIL = 'Argument: name.',
                  HINT = 'Scopes are defined with tollgate.define_scope(name, description).';
    END IF;

    SELECT count(*), min(t.id::text) INTO carriers, example
        FROM tollgate.api_tokens t
        WHERE $1 = ANY (t.scopes) AND t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now());
    IF carriers > 0 THEN
        RAISE EXCEPTION 'scope % cannot be dropped because % live token(s) have it', tollgate.quote_redacted($1), carriers
            USING ERRCODE = 'dependent_objects_still_exist',
                  DETAIL = format('One of them has the id %s.', example),
                  HINT = 'Revoke those tokens, or let them expire, then drop the scope.';
    END IF;
    SELECT min(i.issuer) INTO example FROM tollgate.issuers i WHERE $1 = ANY (i.scopes) AND i.distrusted_at IS NULL;
    IF example IS NOT NULL THEN
        RAISE EXCEPTION 'scope % cannot be dropped because it may come of tokens of a trusted issuer', tollgate.quote_redacted($1)
            USING ERRCODE = 'dependent_objects_still_exist', DETAIL = format('The issuer is %s.', example),
                  HINT = 'Trust the issuer without this scope, with tollgate.trust_issuer(), then drop the scope.';
    END IF;
    SELECT min(s.id) INTO example FROM tollgate.services s WHERE $1 = ANY (s.scopes);
    IF example IS NOT NULL THEN
        RAISE EXCEPTION 'scope % cannot be dropped because a service account may have it', tollgate.quote_redacted($1)
            USING ERRCODE = 'dependent_objects_still_exist', DETAIL = format('The account is %s.', example),
                  HINT = 'Take it from the account, with tollgate.update_service_account(), then drop the scope.';
    END IF;

    INSERT INTO tollgate.audit_log (event, detail) VALUES ('scope.dropped', jsonb_build_object('scope', $1, 'description', dropped));
END
$$;
COMMENT ON FUNCTION tollgate.drop_scope(text) IS
    'Removes a scope from the catalogue; refused (2BP01) while a live token has it, or tokens of a trusted issuer or a service account may; event scope.dropped';

CREATE FUNCTION tollgate.list_scopes() RETURNS TABLE (name text, description text, defined_at timestamptz, defined_by text)
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 20
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT s.name, s.description, s.defined_at, s.defined_by FROM tollgate.scopes s ORDER BY s.name;
END;
COMMENT ON FUNCTION tollgate.list_scopes() IS 'The scope catalogue, by name';
