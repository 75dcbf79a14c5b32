-- Signing keys. The public half is readable here; the private half is sealed with a master key that is never in the
-- database (extension/core/src/seal_box.rs), so a dump, a backup or a stolen data directory signs nothing.
--
-- The state of a key follows from its times alone, so no job has to run at the moment a key starts or stops signing:
-- published → signing → retiring → gone; or withdrawn, which takes effect at once. Of each purpose one key signs at a
-- time: the one that started last. Keys that sign URLs have names, each of which is a purpose of its own; so have the keys of
-- other systems by which imported tokens are found (import_keys.sql), which sign nothing and have no states. The library reads this table by column numbers (extension/src/store/keys.rs).

CREATE TABLE tollgate.sealed_keys (
    kid              text        COLLATE "C" NOT NULL CONSTRAINT sealed_keys_pkey PRIMARY KEY CHECK (octet_length(kid) = 43),
    purpose          text        COLLATE "C" NOT NULL
                     CHECK (purpose IN ('access_token', 'refresh_token') OR purpose ~ '^(signed_url|token_import):[a-z0-9][a-z0-9_.-]{0,62}$'),
    algorithm        text        COLLATE "C" NOT NULL CHECK (algorithm IN ('ES256', 'EdDSA', 'RS256', 'HS256')),
    public_key       text        CHECK (octet_length(public_key) <= 4096),
    sealed           bytea       CHECK (octet_length(sealed) <= 8192),
    signs_from       timestamptz NOT NULL,
    retires_at       timestamptz,
    verifies_until   timestamptz,
    withdrawn_at     timestamptz,
    withdrawn_reason text,
    created_at       timestamptz NOT NULL DEFAULT now(),
    created_by       text        NOT NULL DEFAULT tollgate.acting_role(),
    -- A secret key has nothing to publish.
    CHECK ((public_key IS NULL) = (purpose <> 'access_token')),
    CHECK ((algorithm = 'HS256') = (purpose <> 'access_token'))
) USING heap;
COMMENT ON TABLE tollgate.sealed_keys IS 'Signing keys: the public half as a JWK, the private half sealed with a master key that is kept outside of the database';
COMMENT ON COLUMN tollgate.sealed_keys.kid IS 'The thumbprint of the public key (RFC 7638), or a digest that names a secret one';
COMMENT ON COLUMN tollgate.sealed_keys.public_key IS 'The public key as a JWK (RFC 7517); NULL of a secret key';
COMMENT ON COLUMN tollgate.sealed_keys.sealed IS 'The private key in PKCS#8, or the secret key, sealed for this kid, algorithm and purpose; NULL once it is not used any more';
COMMENT ON COLUMN tollgate.sealed_keys.retires_at IS 'When the next key starts to sign';
COMMENT ON COLUMN tollgate.sealed_keys.verifies_until IS 'When the last token that it may have signed is over';

CREATE INDEX sealed_keys_signing ON tollgate.sealed_keys (purpose, signs_from)
    WHERE sealed IS NOT NULL AND withdrawn_at IS NULL;
CREATE INDEX sealed_keys_live ON tollgate.sealed_keys (verifies_until) WHERE withdrawn_at IS NULL;
SELECT pg_extension_config_dump('tollgate.sealed_keys', '');

CREATE FUNCTION tollgate.make_key(algorithm text, purpose text) RETURNS text[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'make_key';
COMMENT ON FUNCTION tollgate.make_key(text, text) IS
    'A new key pair: kid, algorithm, public JWK and sealed private key in hexadecimal digits. For refresh tokens and URLs a secret key, and NULL for the JWK. Internal.';

CREATE FUNCTION tollgate.read_key(pem text, purpose text) RETURNS text[]
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'read_key';
COMMENT ON FUNCTION tollgate.read_key(text, text) IS
    'The key pair in a PEM block of PKCS#8, as make_key returns it. Internal.';

CREATE FUNCTION tollgate.reseal_key(sealed bytea, kid text, algorithm text, purpose text) RETURNS bytea
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'reseal_key';
COMMENT ON FUNCTION tollgate.reseal_key(bytea, text, text, text) IS
    'A sealed private key, sealed with the first master key. Internal.';

CREATE FUNCTION tollgate.master_key_ids() RETURNS text[]
    LANGUAGE c VOLATILE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'master_key_ids';
COMMENT ON FUNCTION tollgate.master_key_ids() IS
    'The ids of the master keys that this server has loaded, of which the first one seals. An id discloses nothing of its key. Internal.';

CREATE FUNCTION tollgate.master_key_fault() RETURNS text
    LANGUAGE c VOLATILE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'master_key_fault';
COMMENT ON FUNCTION tollgate.master_key_fault() IS
    'Why the master keys could not be read when that was last tried; NULL if they were read. Internal.';

CREATE FUNCTION tollgate.test_signing_key(purpose text DEFAULT 'access_token') RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'test_signing_key';
COMMENT ON FUNCTION tollgate.test_signing_key(text) IS
    'Signs a fixed text with the key that signs now, verifies the signature with the public key of its row, and returns the kid; of refresh tokens and URLs opens the key. Raises what a caller would see who issues a token. Internal.';

CREATE FUNCTION tollgate.master_key_of(sealed bytea) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT encode(substring($1 FROM 2 FOR 8), 'hex');
END;
COMMENT ON FUNCTION tollgate.master_key_of(bytea) IS 'The id of the master key that a value is sealed with. Internal.';

CREATE FUNCTION tollgate.key_state(signs_from timestamptz, retires_at timestamptz, verifies_until timestamptz, withdrawn_at timestamptz)
    RETURNS text
    LANGUAGE sql VOLATILE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT CASE WHEN $4 IS NOT NULL THEN 'withdrawn'
                WHEN $3 <= c.now THEN 'gone'
                WHEN $2 <= c.now THEN 'retiring'
                WHEN $1 <= c.now THEN 'signing'
                ELSE 'published' END
        FROM (SELECT clock_timestamp() AS now) c;
END;
COMMENT ON FUNCTION tollgate.key_state(timestamptz, timestamptz, timestamptz, timestamptz) IS 'The state of a key, by its times. Internal.';

-- Changes of keys wait for each other; signing and verifying do not wait for them.
CREATE FUNCTION tollgate.lock_keys() RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- With a snapshot older than the lock, a key that was just added would be invisible.
    PERFORM tollgate.check_read_committed('keys cannot be changed', 'It may not see those that were just added.', 'Change them');
    LOCK TABLE tollgate.sealed_keys IN SHARE ROW EXCLUSIVE MODE;
END
$$;
COMMENT ON FUNCTION tollgate.lock_keys() IS 'Has other changes of keys wait until this transaction ends. Internal.';

-- A key stops signing when the next one starts. What it signed is over a day later, which no access token outlives. The key of
-- a session's refresh tokens stays the same for its life, which is a year at most, and a signed URL lives for no longer.
CREATE FUNCTION tollgate.chain_keys(purpose text, moment timestamptz) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    UPDATE tollgate.sealed_keys k SET retires_at = n.signs_from,
                                    verifies_until = n.signs_from + CASE $1 WHEN 'access_token' THEN interval '1 day' ELSE interval '367 days' END
        FROM (SELECT o.kid, lead(o.signs_from) OVER (ORDER BY o.signs_from, o.kid) AS signs_from
              FROM tollgate.sealed_keys o
              WHERE o.purpose = $1 AND o.withdrawn_at IS NULL AND (o.retires_at IS NULL OR o.retires_at > $2)) n
        WHERE k.kid = n.kid AND k.retires_at IS DISTINCT FROM n.signs_from;
    UPDATE tollgate.sealed_keys k SET sealed = NULL WHERE k.sealed IS NOT NULL AND k.verifies_until <= $2;
    DELETE FROM tollgate.sealed_keys k WHERE k.withdrawn_at IS NULL AND k.verifies_until < $2 - interval '30 days';
END;
COMMENT ON FUNCTION tollgate.chain_keys(text, timestamptz) IS
    'Ends each key of a purpose where the next one starts; erases the private half of keys that are gone, and deletes them a month later. Internal.';

CREATE FUNCTION tollgate.add_key(key text[], purpose text, signs_in interval, event text) RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    moment   timestamptz := clock_timestamp();
    replaces text;
    starts   timestamptz;
BEGIN
    -- An import that is repeated changes nothing; what was withdrawn does not come back.
    IF EXISTS (SELECT FROM tollgate.sealed_keys k WHERE k.kid = $1[1]) THEN
        IF EXISTS (SELECT FROM tollgate.sealed_keys k WHERE k.kid = $1[1] AND k.withdrawn_at IS NOT NULL) THEN
            RAISE EXCEPTION 'this key was withdrawn'
                USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = format('Its kid is %s.', $1[1]),
                      HINT = 'Create another one with tollgate.create_signing_key().';
        END IF;
        RETURN $1[1];
    END IF;
    IF (SELECT count(*) FROM tollgate.sealed_keys k
        WHERE k.purpose = $2 AND k.withdrawn_at IS NULL AND (k.verifies_until IS NULL OR k.verifies_until > moment)) >= 500 THEN
        RAISE EXCEPTION 'there are 500 keys that verify'
            USING ERRCODE = 'program_limit_exceeded', DETAIL = 'Each reader of the JWKS reads all of them.',
                  HINT = 'Withdraw keys that are not needed, or wait until those that retire are gone.';
    END IF;
    SELECT k.kid INTO replaces FROM tollgate.sealed_keys k
        WHERE k.purpose = $2 AND k.withdrawn_at IS NULL AND (k.retires_at IS NULL OR k.retires_at > moment)
        ORDER BY k.signs_from DESC LIMIT 1;
    starts := moment + CASE WHEN replaces IS NULL THEN interval '0' ELSE coalesce($3, interval '24 hours') END;
    INSERT INTO tollgate.sealed_keys (kid, purpose, algorithm, public_key, sealed, signs_from)
        VALUES ($1[1], $2, $1[2], $1[3], decode($1[4], 'hex'), starts);
    PERFORM tollgate.chain_keys($2, moment);
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES ($4, jsonb_strip_nulls(jsonb_build_object(
            'kid', $1[1], 'algorithm', $1[2], 'purpose', $2, 'signs_from', starts, 'replaces', replaces)));
    RETURN $1[1];
END
$$;
COMMENT ON FUNCTION tollgate.add_key(text[], text, interval, text) IS 'Stores a new key, which replaces the latest one of its purpose. Internal.';

CREATE FUNCTION tollgate.check_signs_in(signs_in interval) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 < interval '0' OR $1 > interval '1 year' THEN
        RAISE EXCEPTION 'a key starts to sign within a year'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: signs_in, of %s.', $1),
                  HINT = 'Give the time that readers of the JWKS need to see the key, such as 24 hours.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_signs_in(interval) IS 'Raises 22023 unless the time until a key starts to sign is sensible. Internal.';

CREATE FUNCTION tollgate.create_signing_key(algorithm text DEFAULT 'ES256', signs_in interval DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.check_signs_in($2);
    PERFORM tollgate.lock_keys();
    RETURN tollgate.add_key(tollgate.make_key($1, 'access_token'), 'access_token', $2, 'key.created');
END
$$;
COMMENT ON FUNCTION tollgate.create_signing_key(text, interval) IS
    'Creates a key (ES256, EdDSA or RS256) and returns its kid; event key.created. It is in the JWKS at once and replaces the signing key after signs_in, or after 24 hours; where no key signs, it signs at once';

CREATE FUNCTION tollgate.import_signing_key(pem text, signs_in interval DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.check_signs_in($2);
    PERFORM tollgate.lock_keys();
    RETURN tollgate.add_key(tollgate.read_key($1, 'access_token'), 'access_token', $2, 'key.imported');
END
$$;
COMMENT ON FUNCTION tollgate.import_signing_key(text, interval) IS
    'Stores a private key that was made elsewhere, a PEM block of PKCS#8, and returns its kid; event key.imported. It replaces the signing key as create_signing_key says; one that is stored already is left as it is';

CREATE FUNCTION tollgate.rotate_signing_key(signs_in interval DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    same text;
BEGIN
    PERFORM tollgate.check_signs_in($1);
    PERFORM tollgate.lock_keys();
    SELECT k.algorithm INTO same FROM tollgate.sealed_keys k
        WHERE k.purpose = 'access_token' AND k.withdrawn_at IS NULL ORDER BY k.signs_from DESC LIMIT 1;
    RETURN tollgate.add_key(tollgate.make_key(coalesce(same, 'ES256'), 'access_token'), 'access_token', $1, 'key.created');
END
$$;
COMMENT ON FUNCTION tollgate.rotate_signing_key(interval) IS
    'Creates a key of the same algorithm as the latest one, and returns its kid: see create_signing_key';

-- For the daemon. It decides nothing but how often, and no more than daily: each key is in the JWKS for a day before it
-- signs.
CREATE FUNCTION tollgate.rotate_due_signing_key(every interval) RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    kind   text;
    latest tollgate.sealed_keys;
    made   text;
    first  text;
BEGIN
    IF $1 IS NULL OR $1 < interval '2 days' OR $1 > interval '10 years' THEN
        RAISE EXCEPTION 'keys are rotated every 2 days to 10 years'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: every, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give how long a key signs, such as 90 days.';
    END IF;
    PERFORM tollgate.lock_keys();
    FOREACH kind IN ARRAY '{access_token, refresh_token}'::text[] LOOP
        -- Also erases the private half of a key that is gone by now.
        PERFORM tollgate.chain_keys(kind, clock_timestamp());
        SELECT k.* INTO latest FROM tollgate.sealed_keys k
            WHERE k.purpose = kind AND k.withdrawn_at IS NULL ORDER BY k.signs_from DESC LIMIT 1;
        -- The first key is not made by the daemon: without one, nothing is to be signed here.
        IF FOUND AND latest.signs_from + $1 - interval '24 hours' <= clock_timestamp() THEN
            made := tollgate.add_key(tollgate.make_key(latest.algorithm, kind), kind, interval '24 hours', 'key.created');
            first := coalesce(first, made);
        END IF;
    END LOOP;
    RETURN first;
END
$$;
COMMENT ON FUNCTION tollgate.rotate_due_signing_key(interval) IS
    'Creates the next signing key a day before the latest one has signed for that long, and returns its kid; NULL if it is not time yet, or there is no key. Likewise the next key of refresh tokens, for sessions that are opened later';

CREATE FUNCTION tollgate.withdraw_signing_key(kid text, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    moment  timestamptz := clock_timestamp();
    given   text := tollgate.stored_reason($2);
    key     tollgate.sealed_keys;
    next_id text;
BEGIN
    PERFORM tollgate.without_token('kid', $1);
    PERFORM tollgate.lock_keys();
    SELECT k.* INTO key FROM tollgate.sealed_keys k
        WHERE k.kid = $1 AND k.withdrawn_at IS NULL AND NOT starts_with(k.purpose, 'token_import:');
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE tollgate.sealed_keys k SET withdrawn_at = moment, withdrawn_reason = given, sealed = NULL WHERE k.kid = $1;
    -- Tokens can be issued again at once if the next key is there already.
    IF key.signs_from <= moment AND (key.retires_at IS NULL OR key.retires_at > moment) THEN
        SELECT k.kid INTO next_id FROM tollgate.sealed_keys k
            WHERE k.purpose = key.purpose AND k.withdrawn_at IS NULL AND k.signs_from > moment ORDER BY k.signs_from LIMIT 1;
        IF FOUND THEN
            UPDATE tollgate.sealed_keys k SET signs_from = moment WHERE k.kid = next_id;
        ELSIF key.purpose = 'access_token' THEN
            RAISE NOTICE 'no key signs any more'
                USING HINT = 'Create the next one with tollgate.create_signing_key().';
        ELSIF starts_with(key.purpose, 'signed_url:') THEN
            RAISE NOTICE 'no key of this name signs URLs any more'
                USING HINT = 'Create the next one with tollgate.create_url_key().';
        END IF;
    END IF;
    PERFORM tollgate.chain_keys(key.purpose, moment);
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES ('key.withdrawn', jsonb_strip_nulls(jsonb_build_object(
            'kid', $1, 'algorithm', key.algorithm, 'purpose', key.purpose, 'reason', given, 'signs_now', next_id)));
    PERFORM tollgate.notify_token_event('key.withdrawn', NULL, NULL, given, NULL);
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.withdraw_signing_key(text, text) IS
    'Ends a key at once: what it signed is refused, and its private half is erased; event key.withdrawn. If it was the signing key, the next published one signs from now on. A key of refresh tokens ends its sessions, and the next session gets another one. False if there is no such key, or it was withdrawn before. Needs no master key';

CREATE FUNCTION tollgate.reseal_signing_keys() RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    first    text;
    resealed bigint;
BEGIN
    PERFORM tollgate.lock_keys();
    first := (tollgate.master_key_ids())[1];
    UPDATE tollgate.sealed_keys k SET sealed = tollgate.reseal_key(k.sealed, k.kid, k.algorithm, k.purpose)
        WHERE k.sealed IS NOT NULL AND tollgate.master_key_of(k.sealed) IS DISTINCT FROM first;
    GET DIAGNOSTICS resealed = ROW_COUNT;
    IF resealed > 0 THEN
        INSERT INTO tollgate.audit_log (event, detail)
            VALUES ('keys.resealed', jsonb_build_object('count', resealed, 'master_key', first));
    END IF;
    RETURN resealed;
END
$$;
COMMENT ON FUNCTION tollgate.reseal_signing_keys() IS
    'Seals all private keys with the first master key, all or none of them, and returns how many were sealed with another one; event keys.resealed';

CREATE FUNCTION tollgate.list_signing_keys() RETURNS TABLE (
        kid text, purpose text, algorithm text, state text, signs_from timestamptz, retires_at timestamptz, verifies_until timestamptz,
        withdrawn_at timestamptz, withdrawn_reason text, created_at timestamptz, created_by text, master_key text, can_sign boolean)
    LANGUAGE sql VOLATILE PARALLEL SAFE SECURITY DEFINER ROWS 10
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT k.kid, k.purpose, k.algorithm, tollgate.key_state(k.signs_from, k.retires_at, k.verifies_until, k.withdrawn_at),
           k.signs_from, k.retires_at, k.verifies_until, k.withdrawn_at, k.withdrawn_reason, k.created_at, k.created_by,
           tollgate.master_key_of(k.sealed), coalesce(tollgate.master_key_of(k.sealed) = ANY (m.ids), false)
        FROM tollgate.sealed_keys k, (SELECT tollgate.master_key_ids() AS ids) m
        WHERE NOT starts_with(k.purpose, 'token_import:')
        ORDER BY k.purpose, k.signs_from DESC, k.kid;
END;
COMMENT ON FUNCTION tollgate.list_signing_keys() IS 'The rows of the view signing_keys';

CREATE VIEW tollgate.signing_keys AS
    SELECT k.kid, k.purpose, k.algorithm, k.state, k.signs_from, k.retires_at, k.verifies_until, k.withdrawn_at, k.withdrawn_reason,
           k.created_at, k.created_by, k.master_key, k.can_sign
    FROM tollgate.list_signing_keys() k;
COMMENT ON VIEW tollgate.signing_keys IS
    'The signing keys and their states: published, signing, retiring, gone, withdrawn; with the id of the master key that each is sealed with (NULL once its private half is erased), and whether this server can open it';

CREATE FUNCTION tollgate.list_master_keys() RETURNS TABLE (id text, loaded boolean, seals boolean, keys bigint)
    LANGUAGE sql VOLATILE PARALLEL SAFE SECURITY DEFINER ROWS 2
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(l.id, s.id), l.id IS NOT NULL, coalesce(l.place = 1, false), coalesce(s.keys, 0)
        FROM unnest(tollgate.master_key_ids()) WITH ORDINALITY l (id, place)
        FULL JOIN (SELECT tollgate.master_key_of(k.sealed) AS id, count(*) AS keys
                   FROM tollgate.sealed_keys k WHERE k.sealed IS NOT NULL GROUP BY 1) s ON s.id = l.id
        ORDER BY l.place, s.id;
END;
COMMENT ON FUNCTION tollgate.list_master_keys() IS
    'The master keys, by their ids, in the order of the file: whether this server has loaded it, whether it seals, and how many private keys are sealed with it';

-- Public keys only. A withdrawn key is no longer in it; readers that keep a copy learn of that when they fetch it again.
CREATE FUNCTION tollgate.jwks() RETURNS jsonb
    LANGUAGE sql VOLATILE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT jsonb_build_object('keys', coalesce(jsonb_agg(k.public_key::jsonb ORDER BY k.signs_from DESC, k.kid), '[]'))
        FROM tollgate.sealed_keys k
        WHERE k.public_key IS NOT NULL AND k.withdrawn_at IS NULL
          AND tollgate.key_state(k.signs_from, k.retires_at, k.verifies_until, k.withdrawn_at) <> 'gone';
END;
COMMENT ON FUNCTION tollgate.jwks() IS
    'The public keys that verify access tokens of this database, as a JWK set (RFC 7517): published, signing and retiring ones, the latest first';

-- For monitoring: what must be noticed before tokens cannot be issued any more.
CREATE FUNCTION tollgate.key_status(OUT master_keys bigint, OUT can_sign boolean, OUT signs_since timestamptz, OUT signs_until timestamptz)
    LANGUAGE sql VOLATILE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT cardinality(m.ids)::bigint, k.can_sign, k.signs_since, k.signs_until
        FROM (SELECT tollgate.master_key_ids() AS ids) m, LATERAL (
            SELECT bool_or(s.state = 'signing' AND tollgate.master_key_of(s.sealed) = ANY (m.ids)) AS can_sign,
                   max(s.signs_from) FILTER (WHERE s.state = 'signing') AS signs_since,
                   max(s.retires_at) FILTER (WHERE s.state = 'signing') AS signs_until
                FROM (SELECT o.sealed, o.signs_from, o.retires_at,
                             tollgate.key_state(o.signs_from, o.retires_at, o.verifies_until, o.withdrawn_at) AS state
                      FROM tollgate.sealed_keys o
                      WHERE o.purpose = 'access_token' AND o.sealed IS NOT NULL AND o.withdrawn_at IS NULL) s) k;
END;
COMMENT ON FUNCTION tollgate.key_status() IS
    'For monitoring: how many master keys this server has loaded, whether it can sign access tokens (NULL where there is no signing key), since when the signing key signs, and until when, if the next one is there';

CREATE FUNCTION tollgate.key_faults() RETURNS TABLE (severity text, detail text, remedy text)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE ROWS 1
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    loaded text[] := tollgate.master_key_ids();
    fault  text := tollgate.master_key_fault();
    kind   text;
BEGIN
    RETURN QUERY SELECT 'fail', 'there are signing keys, but no master key is loaded: nothing is signed' || coalesce('. ' || fault, ''),
            'tollgated key init FILE (once), then: ALTER SYSTEM SET tollgate.master_key_file = ''FILE''; SELECT pg_reload_conf();'
        WHERE cardinality(loaded) = 0
          AND EXISTS (SELECT FROM tollgate.sealed_keys k WHERE k.sealed IS NOT NULL AND NOT starts_with(k.purpose, 'token_import:'));
    RETURN QUERY SELECT 'fail', format('no master key is loaded: tokens that were imported with the key %s and not used yet are refused', i.name)
                                || coalesce('. ' || fault, ''),
            'have the server load the master key again: tollgate.master_key_file, then SELECT pg_reload_conf();'
        FROM tollgate.list_import_keys() i WHERE cardinality(loaded) = 0 AND i.is_needed;
    IF cardinality(loaded) > 0 AND EXISTS (SELECT FROM tollgate.sealed_keys k WHERE k.sealed IS NOT NULL) THEN
        -- Without a key of refresh tokens the next session creates one.
        FOR kind IN SELECT 'access_token' WHERE EXISTS (SELECT FROM tollgate.sealed_keys k WHERE k.sealed IS NOT NULL AND NOT starts_with(k.purpose, 'token_import:'))
                    UNION SELECT k.purpose FROM tollgate.sealed_keys k
                    WHERE tollgate.key_state(k.signs_from, k.retires_at, k.verifies_until, k.withdrawn_at) = 'signing' ORDER BY 1
        LOOP
            BEGIN
                PERFORM tollgate.test_signing_key(kind);
            EXCEPTION WHEN object_not_in_prerequisite_state OR data_corrupted THEN
                GET STACKED DIAGNOSTICS severity = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, remedy = PG_EXCEPTION_HINT;
                detail := severity || '. ' || detail;
                severity := 'fail';
                RETURN NEXT;
            END;
        END LOOP;
    END IF;
    RETURN QUERY SELECT 'fail', 'the master keys could not be read again, so the earlier ones are used until a restart. ' || fault,
            'correct it, then: SELECT pg_reload_conf();'
        WHERE cardinality(loaded) > 0 AND fault IS NOT NULL;
    RETURN QUERY SELECT 'fail', format('%s private keys are sealed with master key %s, which this server does not have', count(*), tollgate.master_key_of(k.sealed)),
            'add that key to the file, then: SELECT pg_reload_conf();'
        FROM tollgate.sealed_keys k
        WHERE k.sealed IS NOT NULL AND cardinality(loaded) > 0 AND tollgate.master_key_of(k.sealed) <> ALL (loaded)
        GROUP BY tollgate.master_key_of(k.sealed);
    RETURN QUERY SELECT 'warn', format('%s private keys are sealed with master key %s, which is not the first one', count(*), tollgate.master_key_of(k.sealed)),
            'tollgated key reseal'
        FROM tollgate.sealed_keys k
        WHERE k.sealed IS NOT NULL AND tollgate.master_key_of(k.sealed) = ANY (loaded[2:])
        GROUP BY tollgate.master_key_of(k.sealed);
    RETURN QUERY SELECT 'warn', format('role %I is a member of %s, and can read the master key', r.rolname, p.rolname),
            format('REVOKE %I FROM %I; (or from the role through which it is a member)', p.rolname, r.rolname)
        FROM pg_roles r, pg_roles p
        WHERE cardinality(loaded) > 0 AND p.rolname IN ('pg_read_server_files', 'pg_execute_server_program')
          AND NOT r.rolsuper AND NOT starts_with(r.rolname, 'pg_') AND pg_has_role(r.oid, p.oid, 'MEMBER')
        ORDER BY r.rolname, p.rolname;
END
$$;
COMMENT ON FUNCTION tollgate.key_faults() IS 'Findings about the signing keys and the master keys, for deployment_health. Internal.';
