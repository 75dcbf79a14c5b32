-- Quotas: how often a token, or all that a user has, may be used in an hour, day, week or month of the calendar, or in all.
-- Shorter budgets, which nothing needs to remember, are rate limits.
--
-- Verification writes nothing. It spends a lease: units that the tables have counted as taken, and that one server may spend
-- in one period. Shared memory counts what this server has spent (extension/core/src/quota.rs), and a verification looks
-- here, by the latest snapshot, only when that is used up or the period is over. Before it is, the server asks for more, in
-- shared memory, and the daemon has the primary grant it, several times a second.
--
-- What is exact. Leases are taken from a quota before they can be spent, and never exceed it. So a quota that is closed is
-- never exceeded, whatever crashes, and at most the unspent leases of the servers are not available to others. A server
-- holds leases under a random name (lease_holder), which a clean restart keeps together with what was spent, and a crash
-- does not: then what it held counts as spent. A quota that is open lets a server go on beyond its lease while units are
-- left here; with one server it is then exact too, but a crash forgets what was spent beyond the lease.
--
-- What can exceed a quota, by what was leased: a failover to a standby that lacks the latest WAL forgets the leases that were
-- granted in it; and a data directory that is copied while the server is stopped has its leases too, under the same name,
-- unless pg_stat/tollgate_usage.stat is removed from the copy.
--
-- Periods. A period is known by its end, which only grows: when a clock goes back, the later period goes on. It ends for a
-- server by its own clock, and nothing is written then: in the next one the primary's server (`holder`) starts with one
-- lease, which counts as taken from the beginning. A standby starts with none, and asks. What was leased and not spent ends
-- with its period.
--
-- Standbys read their leases from their own copy of quota_leases: the daemon only carries requests to the primary, signed with
-- a secret that it cannot read. A request names what its server has been granted, and is void once more was granted: so two
-- daemons, a repeated request, or an operator who keeps some, get a server at most what it asked for, once.
--
-- Who can do what. Only admin sets quotas. An operator can neither invent a request nor grant without one. An issuer can issue
-- tokens without a quota, and so spends past a token's quota, but not past the user's. The holder of a token cannot:
-- what is rotated or derived from it spends the same quota.
--
-- Verification finds a token's quota by the id in its row. A user's is looked up by the user, in databases in which a user
-- has one: a backend remembers that none has until note_user_quota invalidates that. Both read columns by number
-- (extension/src/store/quotas.rs): columns are only ever appended.

CREATE TABLE tollgate.quotas (
    id             uuid        NOT NULL CONSTRAINT quotas_pkey PRIMARY KEY,
    token_id       uuid        CONSTRAINT quotas_token UNIQUE,
    user_id        text COLLATE "C" CONSTRAINT quotas_user UNIQUE CHECK (length(user_id) BETWEEN 1 AND 255),
    amount         bigint      NOT NULL CHECK (amount BETWEEN 1 AND 1000000000000000),
    per            text        NOT NULL CHECK (per IN ('hour', 'day', 'week', 'month', 'lifetime')),
    time_zone      text        NOT NULL,
    lease          bigint      NOT NULL CHECK (lease BETWEEN 1 AND 1000000000000000),
    without_daemon text        NOT NULL CHECK (without_daemon IN ('closed', 'open')),
    ends_at        timestamptz NOT NULL,
    taken          bigint      NOT NULL CHECK (taken >= 0),
    holder         uuid,
    CHECK (num_nonnulls(token_id, user_id) = 1)
) USING heap WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.quotas IS 'How often a token or a user may be used, and how much of that is leased';
COMMENT ON COLUMN tollgate.quotas.token_id IS 'The token that it was set for, or the latest that replaced it';
COMMENT ON COLUMN tollgate.quotas.lease IS 'How many units a server is granted at a time';
COMMENT ON COLUMN tollgate.quotas.ends_at IS 'The end of the period that taken is of; nothing is written when a later one begins';
COMMENT ON COLUMN tollgate.quotas.taken IS 'Units leased in that period, to all servers';
COMMENT ON COLUMN tollgate.quotas.holder IS 'The server, as the primary, that has one lease from the beginning of each later period';
SELECT pg_extension_config_dump('tollgate.quotas', '');

CREATE TABLE tollgate.quota_leases (
    quota_id uuid        NOT NULL CONSTRAINT quota_leases_quota REFERENCES tollgate.quotas ON DELETE CASCADE,
    holder   uuid        NOT NULL,
    ends_at  timestamptz NOT NULL,
    granted  bigint      NOT NULL CHECK (granted >= 0),
    CONSTRAINT quota_leases_pkey PRIMARY KEY (quota_id, holder)
) USING heap WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.quota_leases IS 'How much of a quota a server was granted, in all, in the last period in which it asked for more';
SELECT pg_extension_config_dump('tollgate.quota_leases', '');

CREATE FUNCTION tollgate.note_user_quota() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'note_user_quota';
COMMENT ON FUNCTION tollgate.note_user_quota() IS 'Trigger by which other sessions notice that a user has a quota. Internal.';

CREATE TRIGGER note_user AFTER INSERT ON tollgate.quotas
    FOR EACH ROW WHEN (NEW.user_id IS NOT NULL) EXECUTE FUNCTION tollgate.note_user_quota();
ALTER TABLE tollgate.quotas ENABLE ALWAYS TRIGGER note_user;

CREATE FUNCTION tollgate.quota_period_end(per text, time_zone text, at timestamptz) RETURNS timestamptz
    LANGUAGE c STABLE PARALLEL SAFE STRICT
    AS 'MODULE_PATHNAME', 'quota_period_end';
COMMENT ON FUNCTION tollgate.quota_period_end(text, text, timestamptz) IS
    'The end of the hour, day, week or month of a time zone that a moment is in; infinity for a lifetime. Internal.';

-- ---- Shared memory

CREATE FUNCTION tollgate.lease_holder() RETURNS uuid
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'lease_holder';
COMMENT ON FUNCTION tollgate.lease_holder() IS
    'The name under which this server holds leases: another one after a crash; NULL without shared memory. Internal.';

CREATE FUNCTION tollgate.remembered_quota(quota_id uuid) RETURNS TABLE (id uuid, ends_at timestamptz, granted bigint, spent bigint)
    LANGUAGE c STABLE PARALLEL SAFE STRICT ROWS 1
    AS 'MODULE_PATHNAME', 'remembered_quota_wrapper';
COMMENT ON FUNCTION tollgate.remembered_quota(uuid) IS
    'What this server has been granted of a quota and has spent, as far as it knows; no row if it has spent nothing. Internal.';

CREATE FUNCTION tollgate.remembered_quotas() RETURNS SETOF uuid
    LANGUAGE c VOLATILE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'remembered_quotas_wrapper';
COMMENT ON FUNCTION tollgate.remembered_quotas() IS 'The quotas of this database of which this server remembers something. Internal.';

CREATE FUNCTION tollgate.forget_quota(quota_id uuid) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'forget_quota';
COMMENT ON FUNCTION tollgate.forget_quota(uuid) IS 'Makes this server forget a quota, which must no longer exist: what it has spent of it would be forgotten too. Internal.';

CREATE FUNCTION tollgate.take_lease_requests() RETURNS TABLE (quota_id uuid, ends_at timestamptz, granted bigint, spent bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'take_lease_requests_wrapper';
COMMENT ON FUNCTION tollgate.take_lease_requests() IS
    'The quotas of this database of which this server asks for more, at most some thousand, which then are asked for no longer. Internal.';

CREATE FUNCTION tollgate.forget_removed_quotas() RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    remembered uuid[];
    gone       uuid;
    forgotten  bigint := 0;
BEGIN
    PERFORM tollgate.check_read_committed('quotas cannot be forgotten', 'It may not see those that were just set.', 'Forget them');
    -- Two statements: what was spent of is seen by a snapshot that is taken after that.
    remembered := ARRAY(SELECT r.id FROM tollgate.remembered_quotas() r (id));
    FOR gone IN SELECT r.id FROM unnest(remembered) r (id) WHERE NOT EXISTS (SELECT FROM tollgate.quotas q WHERE q.id = r.id) LOOP
        PERFORM tollgate.forget_quota(gone);
        forgotten := forgotten + 1;
    END LOOP;
    RETURN forgotten;
END
$$;
COMMENT ON FUNCTION tollgate.forget_removed_quotas() IS
    'Makes room in the shared memory of this server, which may be a standby, that removed quotas take, and returns how many there were';

-- ---- Leases

CREATE TYPE tollgate.lease_request AS (
    quota_id  uuid,
    holder    uuid,
    ends_at   timestamptz,
    granted   bigint,
    spent     bigint,
    signature bytea
);
COMMENT ON TYPE tollgate.lease_request IS 'A quota of which a standby asks to lease more, and what it has been granted and has spent';

CREATE FUNCTION tollgate.signature_of_request(quota_id uuid, holder uuid, ends_at timestamptz, granted bigint, spent bigint) RETURNS bytea
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.carrying_signature('quota', ARRAY[uuid_send($1), uuid_send($2), timestamptz_send($3), int8send($4), int8send($5)]);
END;
COMMENT ON FUNCTION tollgate.signature_of_request(uuid, uuid, timestamptz, bigint, bigint) IS 'The signature that proves that one of our servers asks for this. Internal.';

CREATE FUNCTION tollgate.drain_lease_requests() RETURNS SETOF tollgate.lease_request
    LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT w.quota_id, h.holder, w.ends_at, w.granted, w.spent, tollgate.signature_of_request(w.quota_id, h.holder, w.ends_at, w.granted, w.spent)
        FROM tollgate.lease_holder() h (holder), tollgate.take_lease_requests() w;
END;
COMMENT ON FUNCTION tollgate.drain_lease_requests() IS
    'Returns of which quotas a standby asks to lease more, for lease_quotas on the primary. Each is returned once; one that gets lost is made again by a later use. Writes nothing, so it works on a standby';

CREATE FUNCTION tollgate.grant_lease(quota_id uuid, holder uuid, ends_at timestamptz, granted bigint, spent bigint, is_primary boolean) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    quota tollgate.quotas;
    had   bigint;
    units bigint;
BEGIN
    -- One that an administrator is changing is leased later, so that it delays no other.
    SELECT q.* INTO quota FROM tollgate.quotas q WHERE q.id = $1 FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    quota := tollgate.in_present_period(quota);
    had := coalesce((SELECT l.granted FROM tollgate.quota_leases l WHERE l.quota_id = $1 AND l.holder = $2 AND l.ends_at = quota.ends_at),
                    CASE WHEN $2 = quota.holder THEN quota.lease ELSE 0 END);
    -- It has not seen the latest lease yet, or asks for another period.
    IF $3 <> quota.ends_at OR $4 <> had THEN
        RETURN false;
    END IF;
    -- What was spent beyond the lease, of a quota that is open, and another lease.
    units := least(greatest($5 - $4, 0) + quota.lease, quota.amount - quota.taken);
    IF units <= 0 THEN
        RETURN false;
    END IF;
    -- What another server has as the holder stays its own, and it may be the primary again.
    IF $6 AND quota.holder <> $2 THEN
        INSERT INTO tollgate.quota_leases AS l (quota_id, holder, ends_at, granted) VALUES ($1, quota.holder, quota.ends_at, quota.lease)
            ON CONFLICT ON CONSTRAINT quota_leases_pkey DO UPDATE SET ends_at = excluded.ends_at, granted = excluded.granted
                WHERE l.ends_at < excluded.ends_at;
    END IF;
    UPDATE tollgate.quotas q
        SET ends_at = quota.ends_at, taken = quota.taken + units, holder = CASE WHEN $6 THEN $2 ELSE q.holder END
        WHERE q.id = $1;
    INSERT INTO tollgate.quota_leases AS l (quota_id, holder, ends_at, granted) VALUES ($1, $2, quota.ends_at, had + units)
        ON CONFLICT ON CONSTRAINT quota_leases_pkey DO UPDATE SET ends_at = excluded.ends_at, granted = excluded.granted;
    -- Of servers that have gone, or have not asked since.
    DELETE FROM tollgate.quota_leases l WHERE l.quota_id = $1 AND l.ends_at < quota.ends_at;
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.grant_lease(uuid, uuid, timestamptz, bigint, bigint, boolean) IS
    'Grants a server one more lease of a quota, if that is what it asks for, and returns whether it did. Internal.';

CREATE FUNCTION tollgate.in_present_period(quota tollgate.quotas) RETURNS tollgate.quotas
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1.ends_at <= clock_timestamp() THEN
        $1.ends_at := tollgate.quota_period_end($1.per, $1.time_zone, clock_timestamp());
        $1.taken := CASE WHEN $1.holder IS NULL THEN 0 ELSE $1.lease END;
    END IF;
    RETURN $1;
END
$$;
COMMENT ON FUNCTION tollgate.in_present_period(tollgate.quotas) IS 'The row of a quota as it is in the present period. Internal.';

CREATE FUNCTION tollgate.lease_quotas(requests tollgate.lease_request[] DEFAULT '{}') RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    request record;
    leased  bigint := 0;
BEGIN
    IF $1 IS NULL OR cardinality($1) > 10000 THEN
        RAISE EXCEPTION 'these are not requests of a standby'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: requests, which is NULL or has more than 10000 elements.',
                  HINT = 'Pass what drain_lease_requests() returned.';
    END IF;
    FOR request IN
        SELECT w.quota_id, h.holder, w.ends_at, w.granted, w.spent, true AS is_primary
            FROM tollgate.lease_holder() h (holder), tollgate.take_lease_requests() w
        UNION ALL
        SELECT w.quota_id, w.holder, w.ends_at, w.granted, w.spent, false
            FROM unnest($1) w
            -- Requests with another signature are skipped, so that they do not block the rest.
            WHERE w.signature = tollgate.signature_of_request(w.quota_id, w.holder, w.ends_at, w.granted, w.spent)
        ORDER BY 1
    LOOP
        leased := leased + tollgate.grant_lease(request.quota_id, request.holder, request.ends_at, request.granted, request.spent, request.is_primary)::integer;
    END LOOP;
    -- What is spent of a lease must not be granted again after a crash.
    IF leased > 0 AND current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    RETURN leased;
END
$$;
COMMENT ON FUNCTION tollgate.lease_quotas(tollgate.lease_request[]) IS
    'Leases more of the quotas that this server, the primary, and a standby, whose requests drain_lease_requests returned, will soon have used up; returns how many leases were granted. Never more than is left of a quota; a request without our signature, or that was granted already, is skipped';

-- ---- Setting quotas

CREATE FUNCTION tollgate.check_quota_subject(token_id uuid, user_id text) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF num_nonnulls($1, $2) <> 1 THEN
        RAISE EXCEPTION 'a quota is that of a token or of a user'
            USING ERRCODE = 'invalid_parameter_value',
                  DETAIL = format('Arguments: token_id and user_id, of which %s given.', CASE WHEN $1 IS NULL THEN 'none is' ELSE 'both are' END),
                  HINT = 'Pass one of them, by name.';
    END IF;
    IF $1 IS NULL THEN
        PERFORM tollgate.check_user_named($2), tollgate.without_token('user_id', $2);
        IF length($2) > 255 THEN
            RAISE EXCEPTION 'a user_id has at most 255 characters'
                USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: user_id, of %s characters.', length($2)),
                      HINT = 'Pass the key of the user in your application, as text.';
        END IF;
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_quota_subject(uuid, text) IS 'Raises 22023 unless exactly one of a token and a user is given. Internal.';

CREATE FUNCTION tollgate.check_quota(amount bigint, per text, time_zone text, lease bigint, without_daemon text) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    fault text;
BEGIN
    fault := CASE
        WHEN $1 IS NULL OR $1 NOT BETWEEN 1 AND 1000000000000000 THEN 'amount, which is not from 1 to 1000000000000000'
        WHEN $2 IS NULL OR $2 NOT IN ('hour', 'day', 'week', 'month', 'lifetime') THEN 'per, which is none of hour, day, week, month and lifetime'
        WHEN $4 NOT BETWEEN 1 AND $1 THEN 'lease, which is not from 1 to the amount'
        WHEN $5 IS NULL OR $5 NOT IN ('closed', 'open') THEN 'without_daemon, which is neither closed nor open'
        WHEN $3 IS NULL OR length($3) > 100 THEN 'time_zone, which is NULL or too long'
        -- What an abbreviation means is a setting of the session (timezone_abbreviations).
        WHEN upper($3) <> 'UTC' AND strpos($3, '/') = 0 THEN 'time_zone, which is neither UTC nor a name with a slash' END;
    IF fault IS NULL THEN
        BEGIN
            PERFORM tollgate.quota_period_end('day', tollgate.without_token('time_zone', $3), now());
        EXCEPTION WHEN data_exception THEN
            -- PostgreSQL's own message would repeat the value, which may be anything, including a token.
            fault := 'time_zone, which PostgreSQL does not know';
        END;
    END IF;
    IF fault IS NOT NULL THEN
        RAISE EXCEPTION 'this cannot be a quota'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: %s.', fault),
                  HINT = 'Such as: amount => 10000, per => ''month'', time_zone => ''America/New_York''.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_quota(bigint, text, text, bigint, text) IS 'Raises 22023 unless a quota can be like that. Internal.';

CREATE FUNCTION tollgate.lock_quota(token_id uuid, user_id text) RETURNS tollgate.quotas
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    token    tollgate.api_tokens;
    replaced uuid;
    quota    tollgate.quotas;
BEGIN
    PERFORM tollgate.check_quota_subject($1, $2);
    IF $1 IS NULL THEN
        SELECT q.* INTO quota FROM tollgate.quotas q WHERE q.user_id = $2 FOR UPDATE;
        RETURN quota;
    END IF;
    -- Nothing may be derived meanwhile from the tokens that it replaced, which are older and so come first.
    FOR replaced IN SELECT p.id FROM tollgate.predecessors($1) p (id) ORDER BY p.id LOOP
        PERFORM tollgate.lock_token(replaced);
    END LOOP;
    token := tollgate.lock_managed_token($1);
    IF token.parent_id IS NOT NULL THEN
        RAISE EXCEPTION 'a derived token has no quota of its own'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: token_id, of a token that was derived from %s.', token.parent_id),
                  HINT = 'It spends the quota of the token that it was derived from, which can have one.';
    END IF;
    IF token.rotated_to IS NOT NULL THEN
        PERFORM tollgate.refuse_token($1, 'rotated', format('Name its successor, %s, with which it shares its quota.', token.rotated_to));
    END IF;
    SELECT q.* INTO quota FROM tollgate.quotas q WHERE q.id = token.quota_id FOR UPDATE;
    RETURN quota;
END
$$;
COMMENT ON FUNCTION tollgate.lock_quota(uuid, text) IS
    'The quota of a token, whose family it locks, or of a user, locked; NULLs if there is none. Raises unless there can be one. Internal.';

CREATE FUNCTION tollgate.predecessors(token_id uuid) RETURNS SETOF uuid
    LANGUAGE sql STABLE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH RECURSIVE line AS (
        SELECT t.rotated_from AS id FROM tollgate.api_tokens t WHERE t.id = $1
        UNION
        -- Also of one that is over: what it replaced may be in a longer grace.
        SELECT t.rotated_from FROM line l JOIN tollgate.api_tokens t ON t.id = l.id
    )
    SELECT t.id FROM line l JOIN tollgate.api_tokens t ON t.id = l.id
        WHERE t.revoked_at IS NULL AND t.expires_at > clock_timestamp();
END;
COMMENT ON FUNCTION tollgate.predecessors(uuid) IS 'The tokens that a token replaced and that are still accepted, in their grace. Internal.';

CREATE FUNCTION tollgate.set_quota(
    token_id       uuid   DEFAULT NULL,
    user_id        text   DEFAULT NULL,
    amount         bigint DEFAULT NULL,
    per            text   DEFAULT NULL,
    time_zone      text   DEFAULT 'UTC',
    lease          bigint DEFAULT NULL,
    without_daemon text   DEFAULT 'closed'
) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    old      tollgate.quotas;
    new      tollgate.quotas;
    detail   jsonb;
    is_same  boolean;
BEGIN
    PERFORM tollgate.check_quota($3, $4, $5, $6, $7);
    LOOP
        old := tollgate.lock_quota($1, $2);
        detail := jsonb_strip_nulls(jsonb_build_object('amount', $3, 'per', $4, 'time_zone', $5, 'without_daemon', $7, 'amount_before', old.amount));
        is_same := coalesce((old.per, old.time_zone) = ($4, $5), false);
        -- A crash costs a lease: small enough for that, and large enough for the uses that come before the daemon does.
        new.lease := coalesce($6, CASE WHEN is_same AND old.lease <= $3 THEN old.lease END, greatest($3 / 100, least($3 / 4, 10), 1));
        IF is_same AND old.lease = new.lease THEN
            UPDATE tollgate.quotas q SET amount = $3, without_daemon = $7 WHERE q.id = old.id;
            EXIT;
        END IF;
        -- Another period begins anew. With another lease what is leased counts as spent: a server may be about to take the
        -- earlier one.
        new.id := gen_random_uuid();
        new.ends_at := tollgate.quota_period_end($4, $5, clock_timestamp());
        new.taken := 0;
        IF is_same THEN
            old := tollgate.in_present_period(old);
            new.ends_at := old.ends_at;
            new.taken := least(old.taken, $3);
        END IF;
        IF new.taken + new.lease <= $3 THEN
            new.holder := tollgate.lease_holder();
            new.taken := new.taken + CASE WHEN new.holder IS NULL THEN 0 ELSE new.lease END;
        END IF;
        DELETE FROM tollgate.quotas q WHERE q.id = old.id;
        INSERT INTO tollgate.quotas (id, token_id, user_id, amount, per, time_zone, lease, without_daemon, ends_at, taken, holder)
            VALUES (new.id, $1, $2, $3, $4, $5, new.lease, $7, new.ends_at, new.taken, new.holder)
            ON CONFLICT ON CONSTRAINT quotas_user DO NOTHING;
        IF FOUND THEN
            IF $1 IS NOT NULL THEN
                UPDATE tollgate.api_tokens t SET quota_id = new.id
                    WHERE t.id IN (SELECT r.id FROM (SELECT $1 UNION ALL SELECT p.id FROM tollgate.predecessors($1) p (id)) r (id)
                                   UNION ALL
                                   SELECT d.id FROM (SELECT $1 UNION ALL SELECT p.id FROM tollgate.predecessors($1) p (id)) r (id),
                                                    tollgate.descendants(r.id) d (id)
                                   UNION ALL
                                   SELECT s.id FROM tollgate.api_tokens s WHERE s.quota_id = old.id);
            END IF;
            EXIT;
        END IF;
        -- Another session has set one for this user meanwhile.
    END LOOP;
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        VALUES ('quota.set', $1, coalesce($2, (SELECT t.user_id FROM tollgate.api_tokens t WHERE t.id = $1)),
                detail || jsonb_build_object('lease', new.lease));
END
$$;
COMMENT ON FUNCTION tollgate.set_quota(uuid, text, bigint, text, text, bigint, text) IS
    'Sets how often a token, with what is derived from it or replaces it, or all tokens and access tokens of a user may be used, per hour, day, week or month of a time zone, or in all (lifetime). Where there is one of the same period, what was used of it counts on; another period begins anew. lease: how many units a server takes at a time; without_daemon: whether a server goes on (open) or refuses (closed) once its lease is used up and no daemon has leased more; event quota.set';

CREATE FUNCTION tollgate.add_credits(token_id uuid DEFAULT NULL, user_id text DEFAULT NULL, credits bigint DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    quota tollgate.quotas := tollgate.lock_quota($1, $2);
BEGIN
    IF quota.id IS NULL OR quota.per <> 'lifetime' THEN
        RAISE EXCEPTION 'there is no quota that credits can be added to'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = format('It %s.', CASE WHEN quota.id IS NULL THEN 'has none' ELSE 'is per ' || quota.per END),
                  HINT = 'Set one for its lifetime first: tollgate.set_quota(…, per => ''lifetime'').';
    END IF;
    IF $3 IS NULL OR $3 NOT BETWEEN 1 AND 1000000000000000 - quota.amount THEN
        RAISE EXCEPTION 'so many credits cannot be added'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: credits, which is not positive, or with which there are more than 1000000000000000.',
                  HINT = 'Pass how many uses to add to those that there were.';
    END IF;
    UPDATE tollgate.quotas q SET amount = q.amount + $3 WHERE q.id = quota.id;
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        VALUES ('quota.credited', $1, coalesce($2, (SELECT t.user_id FROM tollgate.api_tokens t WHERE t.id = $1)),
                jsonb_build_object('credits', $3, 'amount', quota.amount + $3));
    RETURN quota.amount + $3;
END
$$;
COMMENT ON FUNCTION tollgate.add_credits(uuid, text, bigint) IS
    'Adds uses to a quota for a lifetime, of a token or a user, and returns how many there are in all, used ones included; 55000 if it has no such quota; event quota.credited';

CREATE FUNCTION tollgate.remove_quota(token_id uuid DEFAULT NULL, user_id text DEFAULT NULL, reason text DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    quota tollgate.quotas;
BEGIN
    $3 := tollgate.stored_reason($3);
    quota := tollgate.lock_quota($1, $2);
    IF quota.id IS NULL THEN
        RETURN false;
    END IF;
    UPDATE tollgate.api_tokens t SET quota_id = NULL WHERE t.quota_id = quota.id;
    DELETE FROM tollgate.quotas q WHERE q.id = quota.id;
    INSERT INTO tollgate.audit_log (event, token_id, user_id, detail)
        VALUES ('quota.removed', $1, coalesce($2, (SELECT t.user_id FROM tollgate.api_tokens t WHERE t.id = $1)),
                jsonb_strip_nulls(jsonb_build_object('amount', quota.amount, 'per', quota.per, 'reason', $3)));
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.remove_quota(uuid, text, text) IS
    'Removes the quota of a token or a user; false if it has none; event quota.removed';

-- ---- Looking at quotas

CREATE TYPE tollgate.quota_state AS (
    id             uuid,
    token_id       uuid,
    user_id        text,
    amount         bigint,
    per            text,
    time_zone      text,
    lease          bigint,
    without_daemon text,
    used           bigint,
    leased         bigint,
    remaining      bigint,
    resets_at      timestamptz
);
COMMENT ON TYPE tollgate.quota_state IS 'A quota, and what is left of it in the present period';

CREATE FUNCTION tollgate.quota_states(ids uuid[]) RETURNS SETOF tollgate.quota_state
    LANGUAGE sql STABLE PARALLEL SAFE ROWS 1
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- What the servers were granted, and have not spent as far as this one knows, is leased. The rest of what was taken is used.
    SELECT q.id, q.token_id, q.user_id, q.amount, q.per, q.time_zone, q.lease, q.without_daemon,
           greatest(p.taken - l.granted, 0) + s.spent,
           greatest(least(l.granted, p.taken) - least(s.spent, s.granted), 0),
           greatest(q.amount - p.taken, 0) + s.granted - s.spent,
           nullif(p.ends_at, 'infinity')
    FROM unnest($1) i (id) JOIN tollgate.quotas q ON q.id = i.id
        CROSS JOIN LATERAL (
            SELECT CASE WHEN e.is_present THEN q.ends_at ELSE tollgate.quota_period_end(q.per, q.time_zone, clock_timestamp()) END AS ends_at,
                   CASE WHEN e.is_present THEN q.taken WHEN q.holder IS NOT NULL THEN q.lease ELSE 0 END AS taken
            FROM (SELECT q.ends_at > clock_timestamp() AS is_present) e) p
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(h.granted), 0)::bigint AS granted,
                   coalesce(sum(h.granted) FILTER (WHERE h.holder = tollgate.lease_holder()), 0)::bigint AS own
            FROM (SELECT g.holder, g.granted FROM tollgate.quota_leases g WHERE g.quota_id = q.id AND g.ends_at = p.ends_at
                  UNION ALL
                  SELECT q.holder, q.lease
                      WHERE q.holder IS NOT NULL AND NOT EXISTS (
                          SELECT FROM tollgate.quota_leases g WHERE g.quota_id = q.id AND g.ends_at = p.ends_at AND g.holder = q.holder)) h) l
        CROSS JOIN LATERAL (
            SELECT l.own AS granted, coalesce((SELECT r.spent FROM tollgate.remembered_quota(q.id) r WHERE r.ends_at = p.ends_at), 0) AS spent) s;
END;
COMMENT ON FUNCTION tollgate.quota_states(uuid[]) IS 'Quotas, and what is left of them. Internal.';

CREATE FUNCTION tollgate.token_quota(token_id uuid) RETURNS SETOF tollgate.quota_state
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 1
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT s.* FROM tollgate.quota_states(ARRAY(
        SELECT t.quota_id FROM tollgate.api_tokens t WHERE t.id = $1 AND t.quota_id IS NOT NULL
        UNION ALL
        SELECT q.id FROM tollgate.api_tokens t JOIN tollgate.quotas q ON q.user_id = t.user_id COLLATE "C" WHERE t.id = $1)) s
        ORDER BY s.user_id NULLS FIRST;
END;
COMMENT ON FUNCTION tollgate.token_quota(uuid) IS
    'The quotas that a token spends, its own first and then its user''s, at most two rows: used and remaining in the present period, as far as this server knows; leased: held by servers and not known to be spent; resets_at: when the next period begins';

CREATE FUNCTION tollgate.user_quota(user_id text) RETURNS SETOF tollgate.quota_state
    LANGUAGE plpgsql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 1
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.check_user_named($1), tollgate.without_token('user_id', $1);
    RETURN QUERY SELECT s.* FROM tollgate.quota_states(ARRAY(SELECT q.id FROM tollgate.quotas q WHERE q.user_id = $1 COLLATE "C")) s;
END
$$;
COMMENT ON FUNCTION tollgate.user_quota(text) IS
    'The quota of a user or a service account, which all tokens and access tokens of that user spend, at most one row, as token_quota shows it; 22023 without a user';

CREATE FUNCTION tollgate.list_quotas(max_quotas integer DEFAULT NULL, after uuid DEFAULT NULL) RETURNS SETOF tollgate.quota_state
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT s.* FROM tollgate.quota_states(ARRAY(
        SELECT q.id FROM tollgate.quotas q WHERE q.id > coalesce($2, '00000000-0000-0000-0000-000000000000') ORDER BY q.id LIMIT $1)) s
        ORDER BY s.id;
END;
COMMENT ON FUNCTION tollgate.list_quotas(integer, uuid) IS
    'All quotas, or a page of at most max_quotas after the one with an id, as token_quota shows them';

-- The view tokens calls it with the rights of those who read that.
CREATE FUNCTION tollgate.quota_remaining(quota_id uuid) RETURNS bigint
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT s.remaining FROM tollgate.quota_states(ARRAY[$1]) s;
END;
COMMENT ON FUNCTION tollgate.quota_remaining(uuid) IS 'What remains of a quota in the present period, by its id, as token_quota shows it; NULL if there is none';
