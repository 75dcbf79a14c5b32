-- What verification found but cannot write, since it writes nothing: the digest of a token that was imported in another
-- format, and the presentation of a token after its rotation. Findings stay in shared memory until they are in the
-- tables.
--
-- There is no acknowledgement. Each run first frees the findings that are in the tables, and records the rest, so a
-- daemon may die at any moment. On the primary the findings do not pass through the daemon. From a standby it carries
-- only reuse, signed with a secret that it cannot read, so that its login can neither give a token another digest nor
-- end one.

CREATE TYPE tollgate.finding AS (
    token_id  uuid,
    at        timestamptz,
    client_ip inet,
    signature bytea
);
COMMENT ON TYPE tollgate.finding IS 'A token that was presented after its rotation, as a standby recorded it';

CREATE FUNCTION tollgate.found() RETURNS TABLE (number bigint, token_id uuid, at timestamptz, client_ip inet, token_hash bytea)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'found_wrapper';
COMMENT ON FUNCTION tollgate.found() IS
    'What verifications of this database found on this server, at most a few hundred: with token_hash the digest of a token, else that it was presented after its rotation. Internal.';

CREATE FUNCTION tollgate.free_finding(number bigint) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'free_finding';
COMMENT ON FUNCTION tollgate.free_finding(bigint) IS 'Removes a finding; false when it no longer exists. Internal.';

CREATE FUNCTION tollgate.finding_is_settled(token_id uuid, at timestamptz, token_hash bytea) RETURNS boolean
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT NOT EXISTS (
        SELECT FROM tollgate.api_tokens t
        WHERE t.id = $1
          AND t.revoked_at IS NULL
          AND CASE WHEN $3 IS NOT NULL THEN t.foreign_format IS NOT NULL
                   ELSE t.rotated_to IS NOT NULL AND t.expires_at <= $2
                        AND (t.reuse_detected_at IS NULL OR $2 >= t.reuse_detected_at + interval '1 minute') END);
END;
COMMENT ON FUNCTION tollgate.finding_is_settled(uuid, timestamptz, bytea) IS
    'Whether a finding need not be recorded, or no longer: reuse is recorded at most once a minute. Internal.';

CREATE FUNCTION tollgate.settle_findings() RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.free_finding(f.number) FROM tollgate.found() f WHERE tollgate.finding_is_settled(f.token_id, f.at, f.token_hash);
END
$$;
COMMENT ON FUNCTION tollgate.settle_findings() IS 'Removes the findings that are in the tables, on a standby those in its copy of them. Internal.';

CREATE FUNCTION tollgate.signature_of_finding(token_id uuid, at timestamptz, client_ip inet) RETURNS bytea
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.carrying_signature('finding', ARRAY[uuid_send($1), timestamptz_send($2), inet_send($3)]);
END;
COMMENT ON FUNCTION tollgate.signature_of_finding(uuid, timestamptz, inet) IS 'The signature that proves that one of our servers found it. Internal.';

CREATE FUNCTION tollgate.drain_findings() RETURNS SETOF tollgate.finding
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.settle_findings();
    RETURN QUERY SELECT f.token_id, f.at, f.client_ip, tollgate.signature_of_finding(f.token_id, f.at, f.client_ip)
        FROM tollgate.found() f WHERE f.token_hash IS NULL;
END
$$;
COMMENT ON FUNCTION tollgate.drain_findings() IS
    'Returns which tokens a standby saw presented after their rotation, for apply_findings on the primary: the same again until its copy of the tables has them. Writes nothing, so it works on a standby';

CREATE FUNCTION tollgate.give_digest(token_id uuid, token_hash bytea) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token    tollgate.api_tokens;
    affected bigint;
BEGIN
    BEGIN
        UPDATE tollgate.api_tokens t SET token_hash = $2, foreign_format = NULL WHERE t.id = $1 AND t.foreign_format IS NOT NULL;
        RETURN;
    EXCEPTION
        WHEN unique_violation THEN
            NULL;
    END;
    -- It was imported in both formats, and is found by the other row. This one must not become valid again once that is
    -- purged.
    token := tollgate.lock_token($1);
    affected := tollgate.revoke_families(ARRAY[$1], 'imported twice', jsonb_build_object(
        'same_as', (SELECT t.id FROM tollgate.api_tokens t WHERE t.token_hash = $2)));
    IF affected > 0 THEN
        PERFORM tollgate.notify_token_event('token.revoked', NULL, token.user_id, NULL, affected);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.give_digest(uuid, bytea) IS
    'Makes a token that was imported in another format be found by its sha256 from now on; revokes it if another row has that digest, which is the same token. Internal.';

CREATE FUNCTION tollgate.live_successors(token_id uuid) RETURNS SETOF tollgate.api_tokens
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH RECURSIVE line AS (
        SELECT t.rotated_to AS id FROM tollgate.api_tokens t WHERE t.id = $1
        UNION
        SELECT t.rotated_to FROM line l JOIN tollgate.api_tokens t ON t.id = l.id
    )
    SELECT t.* FROM line l JOIN tollgate.api_tokens t ON t.id = l.id
        WHERE t.revoked_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > clock_timestamp());
END;
COMMENT ON FUNCTION tollgate.live_successors(uuid) IS 'The chain of tokens that replaced a token, those of them that are still accepted. Internal.';

CREATE FUNCTION tollgate.record_reuse(token_id uuid, at timestamptz, client_ip inet) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token    tollgate.api_tokens;
    known    uuid[] := '{}';
    live     uuid[];
    affected bigint := 0;
BEGIN
    SELECT t.* INTO token FROM tollgate.api_tokens t WHERE t.id = $1;
    IF token.revoke_on_reuse THEN
        -- The lock order (families.sql) requires the roots first. A token that is rotated while a lock is waited for
        -- has a successor that the next round finds.
        LOOP
            live := ARRAY(SELECT s.id FROM tollgate.live_successors($1) s ORDER BY s.id);
            EXIT WHEN live <@ known;
            PERFORM tollgate.lock_token(s) FROM unnest(live) s;
            known := live;
        END LOOP;
    END IF;
    UPDATE tollgate.api_tokens t SET reuse_detected_at = $2
        WHERE t.id = $1 AND NOT tollgate.finding_is_settled($1, $2, NULL);
    IF NOT FOUND THEN
        RETURN;
    END IF;
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        VALUES ('token.reuse_detected', $1, token.user_id, jsonb_strip_nulls(jsonb_build_object(
            'client_ip', $3, 'presented_at', $2, 'rotated_to', token.rotated_to, 'revokes', token.revoke_on_reuse)));
    IF token.revoke_on_reuse THEN
        affected := tollgate.revoke_families(live, 'reuse detected', jsonb_build_object('reused', $1));
    END IF;
    IF affected > 0 THEN
        PERFORM tollgate.notify_token_event('token.revoked', NULL, token.user_id, NULL, affected);
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.record_reuse(uuid, timestamptz, inet) IS
    'Records that a token was presented after its rotation, at most once a minute, and revokes its successors if its rotation asked for that. Internal.';

CREATE FUNCTION tollgate.apply_findings(findings tollgate.finding[] DEFAULT '{}') RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    finding record;
    taken   bigint := 0;
BEGIN
    IF $1 IS NULL OR cardinality($1) > 1000 THEN
        RAISE EXCEPTION 'these are not findings of a standby'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: findings, which is NULL or has more than 1000 elements.',
                  HINT = 'Pass what drain_findings() returned.';
    END IF;
    IF cardinality($1) = 0 AND NOT EXISTS (SELECT FROM tollgate.found()) THEN
        RETURN 0;
    END IF;
    PERFORM tollgate.settle_findings();
    -- One run at a time, whichever server it is for, so that a finding that two runs have is recorded once.
    LOCK TABLE tollgate.carrying_secret IN SHARE ROW EXCLUSIVE MODE;
    -- Roughly in the order in which others lock several families of a user.
    FOR finding IN
        SELECT g.token_id, g.at, g.client_ip, g.token_hash
        FROM (SELECT f.token_id, f.at, f.client_ip, f.token_hash FROM tollgate.found() f
              UNION ALL
              SELECT f.token_id, f.at, f.client_ip, NULL FROM unnest($1) f
              -- Findings with another signature are skipped, so that they do not block the rest.
              WHERE f.signature = tollgate.signature_of_finding(f.token_id, f.at, f.client_ip)) g
            JOIN tollgate.api_tokens t ON t.id = g.token_id
        WHERE NOT tollgate.finding_is_settled(g.token_id, g.at, g.token_hash)
        ORDER BY t.user_id COLLATE "C", t.id, g.at
    LOOP
        IF finding.token_hash IS NOT NULL THEN
            PERFORM tollgate.give_digest(finding.token_id, finding.token_hash);
        ELSE
            PERFORM tollgate.record_reuse(finding.token_id, finding.at, finding.client_ip);
        END IF;
        taken := taken + 1;
    END LOOP;
    RETURN taken;
END
$$;
COMMENT ON FUNCTION tollgate.apply_findings(tollgate.finding[]) IS
    'Records what verifications of this server found and could not write, and what drain_findings returned on a standby, and returns how many: a token that was imported in another format gets its digest; one that was presented after its rotation, an event token.reuse_detected, at most one a minute';
