-- Secret keys of other systems, which stored HMAC-SHA256(key, token) of their tokens: an imported token is found by computing the
-- same of what is presented (extension/core/src/foreign.rs). They are sealed with the other keys, and needed until each token
-- that was imported with them has Tollgate's own digest, which it gets at its first use.
--
-- The name of a key is in its purpose, `token_import:` and the name, and in the format of its tokens, `hmac-sha256:` and
-- the name.

CREATE FUNCTION tollgate.seal_import_key(key bytea, purpose text) RETURNS text[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'seal_import_key';
COMMENT ON FUNCTION tollgate.seal_import_key(bytea, text) IS 'An import key, as make_key returns a key; its kid is random. Internal.';

CREATE FUNCTION tollgate.check_key_name(name text, kind text, hint text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.without_token('name', $1);
    IF $1 IS NULL OR $1 !~ '^[a-z0-9][a-z0-9_.-]{0,62}$' THEN
        RAISE EXCEPTION 'the name of % has 1 to 63 characters, of a-z, 0-9, "_", "." and "-"', $2
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = 'Argument: name, which ' || CASE WHEN $1 IS NULL THEN 'is NULL.' ELSE 'has others, or another length.' END,
                  HINT = $3;
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_key_name(text, text, text) IS 'Raises 22023 unless a key of this kind may have this name. Internal.';

CREATE FUNCTION tollgate.check_import_key_name(name text) RETURNS void
    LANGUAGE sql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.check_key_name($1, 'an import key', 'Name it after the system that the tokens come from.');
END;
COMMENT ON FUNCTION tollgate.check_import_key_name(text) IS 'Raises 22023 unless an import key may have this name. Internal.';

CREATE FUNCTION tollgate.lock_import_key(name text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM FROM tollgate.sealed_keys k WHERE k.purpose = ('token_import:' || $1) COLLATE "C" AND k.sealed IS NOT NULL AND k.withdrawn_at IS NULL
        FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no import key %', $1
            USING ERRCODE = 'undefined_object', DETAIL = 'Argument: format, which names the key.',
                  HINT = 'Store the key of the other system with tollgate.store_import_key().';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.lock_import_key(text) IS
    'Keeps an import key from being dropped until the transaction ends, as a foreign key would; raises 42704 without one. Internal.';

CREATE FUNCTION tollgate.store_import_key(name text, key bytea) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    of_name text := 'token_import:' || $1;
    made    text[];
    before  text;
BEGIN
    PERFORM tollgate.check_import_key_name($1);
    IF $2 IS NULL OR octet_length($2) NOT BETWEEN 1 AND 1024 THEN
        RAISE EXCEPTION 'an import key has 1 to 1024 bytes'
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = format('Argument: key, which %s.', coalesce('has ' || octet_length($2), 'is NULL')),
                  HINT = 'Pass the bytes with which the other system calls HMAC: convert_to(text, ''UTF8''), or decode(digits, ''hex'').';
    END IF;
    PERFORM tollgate.lock_keys();
    SELECT k.kid INTO before FROM tollgate.sealed_keys k WHERE k.purpose = of_name COLLATE "C";
    -- What is presented and not found is tried with each of them.
    IF before IS NULL AND (SELECT count(*) FROM tollgate.sealed_keys k WHERE starts_with(k.purpose, 'token_import:')) >= 8 THEN
        RAISE EXCEPTION 'there are 8 import keys'
            USING ERRCODE = 'program_limit_exceeded', DETAIL = 'Each wrong token that is presented is tried with each of them.',
                  HINT = 'Drop one that no token needs any more, with tollgate.drop_import_key(): see tollgate.import_keys.';
    END IF;
    made := tollgate.seal_import_key($2, of_name);
    IF before IS NULL THEN
        INSERT INTO tollgate.sealed_keys (kid, purpose, algorithm, sealed, signs_from)
            VALUES (made[1], of_name, made[2], decode(made[4], 'hex'), clock_timestamp());
    ELSE
        UPDATE tollgate.sealed_keys k SET kid = made[1], sealed = decode(made[4], 'hex'), signs_from = clock_timestamp(),
                                          created_at = now(), created_by = tollgate.acting_role()
            WHERE k.kid = before;
    END IF;
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES ('key.imported', jsonb_strip_nulls(jsonb_build_object(
            'kid', made[1], 'algorithm', made[2], 'purpose', of_name, 'replaces', before)));
END
$$;
COMMENT ON FUNCTION tollgate.store_import_key(text, bytea) IS
    'Stores the secret key with which another system made the digests of its tokens by HMAC-SHA256, sealed with the master key; one of that name is replaced; event key.imported. Tokens are then imported with the format hmac-sha256:NAME; 55000 without a master key';

-- By the index of those that wait: a token that was used needs no key, and one that is revoked is refused anyway.
CREATE FUNCTION tollgate.needs_import_key(name text) RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM tollgate.api_tokens t WHERE t.foreign_format = 'hmac-sha256:' || $1 AND t.revoked_at IS NULL);
END;
COMMENT ON FUNCTION tollgate.needs_import_key(text) IS 'Whether a token was imported with this key that is neither used yet nor revoked. Internal.';

CREATE FUNCTION tollgate.drop_import_key(name text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    dropped tollgate.sealed_keys;
BEGIN
    PERFORM tollgate.check_import_key_name($1);
    PERFORM tollgate.lock_keys();
    -- Waits for imports that are under way; the next statement sees what they imported.
    DELETE FROM tollgate.sealed_keys k WHERE k.purpose = ('token_import:' || $1) COLLATE "C" RETURNING k.* INTO dropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no import key %', $1
            USING ERRCODE = 'undefined_object', DETAIL = 'Argument: name.', HINT = 'tollgate.import_keys lists them.';
    END IF;
    IF tollgate.needs_import_key($1) THEN
        RAISE EXCEPTION 'the import key % cannot be dropped because tokens need it', $1
            USING ERRCODE = 'dependent_objects_still_exist',
                  DETAIL = 'They were imported with it, and are neither used yet nor revoked.',
                  HINT = 'Wait until each was used once, or revoke those that are left; expired ones are purged in time.';
    END IF;
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES ('key.withdrawn', jsonb_build_object('kid', dropped.kid, 'algorithm', dropped.algorithm, 'purpose', dropped.purpose));
END
$$;
COMMENT ON FUNCTION tollgate.drop_import_key(text) IS
    'Deletes an import key; event key.withdrawn; refused (2BP01) while a token needs it that is neither used yet nor revoked. Needs no master key';

CREATE FUNCTION tollgate.list_import_keys() RETURNS TABLE (
        name text, is_needed boolean, can_open boolean, master_key text, created_at timestamptz, created_by text)
    LANGUAGE sql VOLATILE PARALLEL SAFE SECURITY DEFINER ROWS 2
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT n.name, tollgate.needs_import_key(n.name), coalesce(tollgate.master_key_of(k.sealed) = ANY (m.ids), false),
           tollgate.master_key_of(k.sealed), k.created_at, k.created_by
        FROM tollgate.sealed_keys k, (SELECT tollgate.master_key_ids() AS ids) m,
             LATERAL (SELECT substr(k.purpose, length('token_import:') + 1) AS name) n
        WHERE starts_with(k.purpose, 'token_import:')
        ORDER BY k.purpose;
END;
COMMENT ON FUNCTION tollgate.list_import_keys() IS 'The rows of the view import_keys';

CREATE VIEW tollgate.import_keys AS
    SELECT k.name, k.is_needed, k.can_open, k.master_key, k.created_at, k.created_by FROM tollgate.list_import_keys() k;
COMMENT ON VIEW tollgate.import_keys IS
    'The keys with which tokens of other systems were imported: whether a token still needs it, and whether this server can open it';
