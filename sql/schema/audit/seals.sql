-- Seals: they show whether the audit log was changed behind Tollgate's back; and purging old events.
--
-- A seal ends a stretch of the log, which begins where the previous seal ended, and holds a hash of the events in it
-- and of the previous seal. A stretch is sealed once nothing can be added to it any more, so sealing never delays
-- writers. Hashes are computed from bytes that are the same on every version and with every setting; each value of
-- varying length is preceded by its length. No secret is involved: an attacker who can rewrite all later seals too is
-- only found out with a seal that was kept elsewhere, as the daemon's log does.
--
-- A purge is a link of the chain as well: a seal without events that names the last seal whose events were removed. The
-- event audit.purged says the same for people, and proves nothing.

CREATE TABLE tollgate.audit_seals (
    seal          bigint      PRIMARY KEY,
    epoch         integer     NOT NULL,
    xid           xid8        NOT NULL,
    events        bigint      NOT NULL,
    first_at      timestamptz NOT NULL,
    last_at       timestamptz NOT NULL,
    sealed_at     timestamptz NOT NULL,
    in_order      bytea       NOT NULL,
    any_order     bytea       NOT NULL,
    hash          bytea       NOT NULL,
    purged_to     bigint,
    purged_before timestamptz,
    CHECK ((purged_to IS NULL) = (purged_before IS NULL))
);
COMMENT ON TABLE tollgate.audit_seals IS
    'One row per sealed stretch of the audit log, append-only: from the end of the previous seal up to (epoch, xid), exclusive';
COMMENT ON COLUMN tollgate.audit_seals.in_order IS 'sha256 of the digests of the events with their places, in order, in chunks of 1000';
COMMENT ON COLUMN tollgate.audit_seals.any_order IS 'The same for the events without their places, sorted: distinguishes reordered from changed';
COMMENT ON COLUMN tollgate.audit_seals.hash IS 'sha256 of the other columns and of the hash of the previous seal';
COMMENT ON COLUMN tollgate.audit_seals.purged_to IS 'In the seal of a purge, which has no events of its own: the last seal whose events were removed';
COMMENT ON COLUMN tollgate.audit_seals.purged_before IS 'In the seal of a purge: the time before which it removed events';
CREATE INDEX audit_seals_purges ON tollgate.audit_seals (purged_to) WHERE purged_to IS NOT NULL;
SELECT pg_extension_config_dump('tollgate.audit_seals', '');

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON tollgate.audit_seals
    FOR EACH STATEMENT EXECUTE FUNCTION tollgate.refuse_audit_change();
ALTER TABLE tollgate.audit_seals ENABLE ALWAYS TRIGGER append_only;

-- A seal depends on the places of events in one log: a subscriber seals its own.
CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE OR DELETE ON tollgate.audit_seals
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.leave_out();
ALTER TABLE tollgate.audit_seals ENABLE REPLICA TRIGGER leave_out;

CREATE FUNCTION tollgate.digest_of(fields bytea[]) RETURNS bytea
    LANGUAGE c IMMUTABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'digest_of';
COMMENT ON FUNCTION tollgate.digest_of(bytea[]) IS 'sha256 of values, each preceded by its length; NULL has the length -1. Internal.';

CREATE FUNCTION tollgate.json_digest(value jsonb) RETURNS bytea
    LANGUAGE c IMMUTABLE PARALLEL SAFE STRICT
    AS 'MODULE_PATHNAME', 'json_digest';
COMMENT ON FUNCTION tollgate.json_digest(jsonb) IS
    'sha256 of a value as it is stored, for a value whose text would be too long. Internal.';

CREATE FUNCTION tollgate.hash_of_seal(seal tollgate.audit_seals, previous bytea) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
    SELECT tollgate.digest_of(ARRAY[
        convert_to('tollgate seal 3', 'UTF8'), int8send(($1).seal), int4send(($1).epoch), xid8send(($1).xid),
        int8send(($1).events), timestamptz_send(($1).first_at), timestamptz_send(($1).last_at),
        timestamptz_send(($1).sealed_at), ($1).in_order, ($1).any_order, int8send(($1).purged_to),
        timestamptz_send(($1).purged_before), $2])
$$;
COMMENT ON FUNCTION tollgate.hash_of_seal(tollgate.audit_seals, bytea) IS
    'The hash that a seal must have after the previous one (NULL for the first). Internal.';

CREATE FUNCTION tollgate.measure_stretch(since tollgate.audit_place, until tollgate.audit_place) RETURNS tollgate.audit_seals
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- Materialized, on disk if it is large, so that each event is digested once. Digests are joined in chunks, and
    -- those of the chunks again, since a value has at most 1 GB and a transaction may have any number of events.
    WITH stretch AS MATERIALIZED (
        SELECT a.epoch, a.xid, a.id, a.at,
               -- Not textsend and similar functions, which write in the client's encoding.
               tollgate.digest_of(ARRAY[
                   timestamptz_send(a.at), convert_to(a.event, 'UTF8'), uuid_send(a.token_id), convert_to(a.user_id, 'UTF8'),
                   convert_to(a.actor, 'UTF8'), convert_to(text(a.client_addr), 'UTF8'),
                   -- Larger values are not written by Tollgate, and may be larger than a text can be.
                   CASE WHEN tollgate.json_text_size(a.detail, 1000000, 64) IS NULL THEN tollgate.json_digest(a.detail)
                        ELSE convert_to(a.detail::text, 'UTF8') END]) AS digest
        FROM tollgate.audit_log a
        WHERE (a.epoch, a.xid) >= (($1).epoch, ($1).xid) AND (a.epoch, a.xid) < (($2).epoch, ($2).xid)
    ), in_order AS (
        SELECT o.n / 1000 AS piece, sha256(string_agg(o.digest, '' ORDER BY o.n)) AS digest
        FROM (SELECT row_number() OVER (ORDER BY s.epoch, s.xid, s.id) - 1 AS n,
                     tollgate.digest_of(ARRAY[int4send(s.epoch), xid8send(s.xid), int8send(s.id), s.digest]) AS digest
              FROM stretch s) o
        GROUP BY o.n / 1000
    ), any_order AS (
        SELECT o.n / 1000 AS piece, sha256(string_agg(o.digest, '' ORDER BY o.n)) AS digest
        FROM (SELECT row_number() OVER (ORDER BY s.digest) - 1 AS n, s.digest FROM stretch s) o
        GROUP BY o.n / 1000
    )
    SELECT NULL::bigint, ($2).epoch, ($2).xid, count(*), min(s.at), max(s.at), NULL::timestamptz,
           (SELECT sha256(coalesce(string_agg(p.digest, '' ORDER BY p.piece), '')) FROM in_order p),
           (SELECT sha256(coalesce(string_agg(p.digest, '' ORDER BY p.piece), '')) FROM any_order p),
           NULL::bytea, NULL::bigint, NULL::timestamptz
    FROM stretch s;
END;
COMMENT ON FUNCTION tollgate.measure_stretch(tollgate.audit_place, tollgate.audit_place) IS
    'The stretch of the log between two places as a seal describes it, without number, time and hash. Internal.';

CREATE FUNCTION tollgate.fault_of_stretch(sealed tollgate.audit_seals, since tollgate.audit_place, purged boolean) RETURNS text
    LANGUAGE plpgsql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    found tollgate.audit_seals := tollgate.measure_stretch($2, ($1.epoch, $1.xid)::tollgate.audit_place);
BEGIN
    RETURN CASE
        WHEN $3 AND found.events = 0 THEN NULL
        WHEN $3 OR found.events > $1.events THEN 'events added'
        WHEN found.events < $1.events THEN 'events removed'
        WHEN found.in_order = $1.in_order THEN NULL
        WHEN found.any_order = $1.any_order THEN 'events reordered'
        ELSE 'events changed'
    END;
END
$$;
COMMENT ON FUNCTION tollgate.fault_of_stretch(tollgate.audit_seals, tollgate.audit_place, boolean) IS
    'What is wrong with the events of a sealed stretch, of which none must remain if it was purged; NULL if nothing. Internal.';

CREATE FUNCTION tollgate.last_purged_seal() RETURNS bigint
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(max(s.purged_to), 0) FROM tollgate.audit_seals s WHERE s.purged_to IS NOT NULL;
END;
COMMENT ON FUNCTION tollgate.last_purged_seal() IS 'The seal up to which the log was purged, according to the chain; 0 if it never was. Internal.';

CREATE FUNCTION tollgate.purge_is_proven(purge tollgate.audit_seals, known_seal bigint) RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
    -- The part of the chain up to a seal that is kept elsewhere is known to be genuine. A later link may have been
    -- written by anyone who can write to the table, so it only proves the purge of events that could be purged anyway:
    -- those older than the retention.
    SELECT ($1).purged_to < ($1).seal AND ($1).purged_before <= ($1).sealed_at AND ($1).sealed_at <= clock_timestamp()
       AND NOT EXISTS (SELECT FROM tollgate.audit_seals s
                       WHERE s.seal <= ($1).purged_to AND s.last_at >= ($1).purged_before
                         AND s.seal > coalesce((SELECT max(p.purged_to) FROM tollgate.audit_seals p
                                                WHERE p.purged_to IS NOT NULL AND p.seal < ($1).seal), 0))
       AND ($2 IS NULL OR ($1).seal <= $2
            OR ($1).purged_before <= ($1).sealed_at - current_setting('tollgate.min_audit_retention')::interval)
$$;
COMMENT ON FUNCTION tollgate.purge_is_proven(tollgate.audit_seals, bigint) IS
    'Whether a purge in the chain is one that purge_audit_log may have done, given a seal that was kept elsewhere. Internal.';

CREATE FUNCTION tollgate.place_after_seal(seal bigint) RETURNS tollgate.audit_place
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce((SELECT (s.epoch, s.xid)::tollgate.audit_place FROM tollgate.audit_seals s WHERE s.seal = $1),
                    (0, '0'::xid8)::tollgate.audit_place);
END;
COMMENT ON FUNCTION tollgate.place_after_seal(bigint) IS 'Where a sealed stretch ends and the next one begins. Internal.';

-- One session at a time, so that the chain has no fork; readers and writers of the log are not blocked.
CREATE FUNCTION tollgate.lock_seals(caller text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- With a snapshot older than the lock below, the last seals would be invisible.
    PERFORM tollgate.check_read_committed($1 || ' cannot run', 'It may not see the last seals.', 'Call it');
    LOCK TABLE tollgate.audit_seals IN SHARE ROW EXCLUSIVE MODE;
END
$$;
COMMENT ON FUNCTION tollgate.lock_seals(text) IS 'Lets one session at a time extend or purge the chain of seals. Internal.';

CREATE FUNCTION tollgate.check_event_count(max_events integer) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $1 IS NULL OR $1 NOT BETWEEN 1 AND 1000000 THEN
        RAISE EXCEPTION 'a call handles 1 to 1000000 events'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: max_events, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Call again for the rest.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.check_event_count(integer) IS 'Raises 22023 unless a number of events is sensible. Internal.';

CREATE FUNCTION tollgate.append_seal(new tollgate.audit_seals) RETURNS tollgate.audit_seals
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous tollgate.audit_seals;
BEGIN
    SELECT s.* INTO previous FROM tollgate.audit_seals s ORDER BY s.seal DESC LIMIT 1;
    new.seal := coalesce(previous.seal, 0) + 1;
    new.sealed_at := clock_timestamp();
    new.hash := tollgate.hash_of_seal(new, previous.hash);
    INSERT INTO tollgate.audit_seals SELECT new.*;
    RETURN new;
END
$$;
COMMENT ON FUNCTION tollgate.append_seal(tollgate.audit_seals) IS
    'Appends a seal to the chain, under lock_seals. Internal.';

CREATE FUNCTION tollgate.seal_audit_log(max_events integer DEFAULT 10000, OUT events bigint, OUT seal bigint, OUT hash bytea)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    previous tollgate.audit_seals;
    since    tollgate.audit_place;
    until    tollgate.audit_place;
    cut      record;
    new      tollgate.audit_seals;
BEGIN
    PERFORM tollgate.check_event_count($1);
    PERFORM tollgate.lock_seals('seal_audit_log');
    SELECT s.* INTO previous FROM tollgate.audit_seals s ORDER BY s.seal DESC LIMIT 1;
    since := tollgate.place_after_seal(previous.seal);
    until := tollgate.final_place();
    -- A stretch consists of whole transactions, so the last one may exceed the number.
    SELECT a.epoch, a.xid INTO cut FROM tollgate.audit_log a
        WHERE (a.epoch, a.xid) >= (since.epoch, since.xid) AND (a.epoch, a.xid) < (until.epoch, until.xid)
        ORDER BY a.epoch, a.xid, a.id OFFSET $1 - 1 LIMIT 1;
    IF FOUND THEN
        until := (cut.epoch, (cut.xid::text::bigint + 1)::text::xid8)::tollgate.audit_place;
    END IF;

    new := tollgate.measure_stretch(since, until);
    events := new.events;
    IF events = 0 THEN
        RETURN;
    END IF;
    new := tollgate.append_seal(new);
    seal := new.seal;
    hash := new.hash;
END
$$;
COMMENT ON FUNCTION tollgate.seal_audit_log(integer) IS
    'Seals the next stretch of the audit log in which every transaction has ended, of about that many events at most: returns their number, and the number and hash of the seal; 0 when there is nothing to seal';

CREATE TYPE tollgate.audit_verification AS (
    whole     boolean,
    fault     text,
    seal      bigint,
    first_at  timestamptz,
    last_at   timestamptz,
    seals     bigint,
    events    bigint,
    purged    bigint,
    last_seal bigint,
    last_hash bytea
);
COMMENT ON TYPE tollgate.audit_verification IS
    'Whether the sealed part of the audit log is intact; if not, the first bad seal, what is wrong and when those events were; how many seals and events are good, how many seals belong to purged events; and the last seal, to be kept elsewhere';

CREATE FUNCTION tollgate.verify_audit_log(known_seal bigint DEFAULT NULL, known_hash bytea DEFAULT NULL) RETURNS tollgate.audit_verification
    LANGUAGE plpgsql STABLE PARALLEL SAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer   tollgate.audit_verification;
    sealed   tollgate.audit_seals;
    since    tollgate.audit_place := (0, '0'::xid8)::tollgate.audit_place;
    previous bytea;
    seen     boolean := false;
BEGIN
    IF ($1 IS NULL) <> ($2 IS NULL) THEN
        RAISE EXCEPTION 'a known seal is given by its number and its hash'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: known_seal and known_hash, of which one is NULL.',
                  HINT = 'Give both as seal_audit_log or an earlier verify_audit_log returned them, or neither.';
    END IF;
    answer.seals := 0;
    answer.events := 0;
    answer.purged := tollgate.last_purged_seal();
    FOR sealed IN SELECT s.* FROM tollgate.audit_seals s ORDER BY s.seal LOOP
        answer.fault := CASE
            WHEN sealed.seal <> answer.seals + 1 THEN 'seal removed'
            WHEN sealed.hash <> tollgate.hash_of_seal(sealed, previous) THEN 'seal changed'
            WHEN sealed.seal = $1 AND sealed.hash <> $2 THEN 'seal changed'
            WHEN sealed.purged_to IS NOT NULL AND tollgate.purge_is_proven(sealed, $1) IS NOT TRUE THEN 'purge not proven'
            ELSE tollgate.fault_of_stretch(sealed, since, sealed.seal <= answer.purged)
        END;
        IF answer.fault IS NOT NULL THEN
            answer.seal := answer.seals + 1;
            answer.first_at := sealed.first_at;
            answer.last_at := sealed.last_at;
            EXIT;
        END IF;
        answer.seals := sealed.seal;
        IF sealed.seal > answer.purged THEN
            answer.events := answer.events + sealed.events;
        END IF;
        since := (sealed.epoch, sealed.xid)::tollgate.audit_place;
        previous := sealed.hash;
    END LOOP;
    IF answer.fault IS NULL AND greatest($1, answer.purged) > answer.seals THEN
        answer.fault := 'seal removed';
        answer.seal := answer.seals + 1;
    END IF;
    answer.whole := answer.fault IS NULL;
    answer.last_seal := nullif(answer.seals, 0);
    answer.last_hash := previous;
    RETURN answer;
END
$$;
COMMENT ON FUNCTION tollgate.verify_audit_log(bigint, bytea) IS
    'Checks all seals and their events, and returns the first bad one. Given a seal that was kept elsewhere, it also detects a log that was sealed again or has lost its last seals, and a later purge of events younger than tollgate.min_audit_retention';

CREATE FUNCTION tollgate.purge_sealed_events(before timestamptz, max_events integer) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    done    bigint;
    next    bigint;
    counted bigint := 0;
    target  tollgate.audit_seals;
    reader  record;
    sealed  tollgate.audit_seals;
    start   tollgate.audit_place;
    since   tollgate.audit_place;
    fault   text;
    oldest  timestamptz;
    removed bigint;
    floor   interval := current_setting('tollgate.min_audit_retention');
    link    tollgate.audit_seals;
BEGIN
    PERFORM tollgate.check_event_count($2);
    IF $1 IS NULL OR NOT isfinite($1) OR $1 > now() THEN
        RAISE EXCEPTION 'the audit log is purged of events before a moment in the past'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: before, of %s.', coalesce($1::text, 'NULL')),
                  HINT = 'Give the time from which events are kept, such as now() - interval ''1 year''.';
    END IF;
    -- The role that may purge does not decide how long the log is kept.
    IF $1 > now() - floor THEN
        RAISE EXCEPTION 'the audit log is kept for at least %', floor
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: before, of %s.', $1),
                  HINT = 'Give an earlier time; a superuser may set tollgate.min_audit_retention.';
    END IF;
    PERFORM tollgate.lock_seals('purge_audit_log');
    done := tollgate.last_purged_seal();
    start := tollgate.place_after_seal(done);
    since := start;
    -- No subscriber may miss an event because it was too old.
    SELECT s.name, tollgate.place_of_cursor(s.place) AS place
        INTO reader FROM tollgate.subscriptions s ORDER BY 2 LIMIT 1;

    -- One stretch after another, at least one of them, up to the first that must stay or the number of events. The seal
    -- of an earlier purge has no events to remove.
    next := done;
    LOOP
        SELECT s.* INTO sealed FROM tollgate.audit_seals s WHERE s.seal > next ORDER BY s.seal LIMIT 1;
        EXIT WHEN NOT FOUND OR sealed.last_at >= $1 OR counted >= $2;
        IF (sealed.epoch, sealed.xid) > ((reader.place).epoch, (reader.place).xid) THEN
            RAISE WARNING 'the subscription % blocks the purge of the audit log from seal % on',
                    tollgate.quote_redacted(reader.name), sealed.seal
                USING HINT = 'If its subscriber is gone for good: tollgate.drop_subscription(name).';
            EXIT;
        END IF;
        -- Otherwise a purge would remove the evidence.
        fault := tollgate.fault_of_stretch(sealed, since, false);
        IF fault IS NOT NULL THEN
            RAISE EXCEPTION 'the audit log was changed since it was sealed, and so is not purged'
                USING ERRCODE = 'data_corrupted', DETAIL = format('Seal %s: %s.', sealed.seal, fault),
                      HINT = 'tollgate.verify_audit_log() shows where.';
        END IF;
        next := sealed.seal;
        since := (sealed.epoch, sealed.xid)::tollgate.audit_place;
        IF sealed.events > 0 THEN
            counted := counted + sealed.events;
            target := sealed;
            oldest := least(oldest, sealed.first_at);
        END IF;
    END LOOP;
    IF counted = 0 THEN
        RETURN 0;
    END IF;

    -- Starts at the first of these places: that skips the dead index entries of earlier purges.
    DELETE FROM tollgate.audit_log a
        WHERE (a.epoch, a.xid) >= (start.epoch, start.xid) AND (a.epoch, a.xid) < (target.epoch, target.xid);
    GET DIAGNOSTICS removed = ROW_COUNT;
    -- From the end of the chain to there; there are no events in between.
    since := tollgate.place_after_seal((SELECT max(s.seal) FROM tollgate.audit_seals s));
    link := tollgate.measure_stretch(since, since);
    link.purged_to := target.seal;
    link.purged_before := $1;
    link.first_at := now();
    link.last_at := now();
    link := tollgate.append_seal(link);
    INSERT INTO tollgate.audit_log (event, detail) VALUES ('audit.purged', jsonb_build_object(
        'before', $1, 'events', removed, 'first_at', oldest, 'last_at', target.last_at, 'first_seal', done + 1, 'last_seal', target.seal,
        'seal', link.seal, 'hash', encode(link.hash, 'hex')));
    RETURN removed;
END
$$;
COMMENT ON FUNCTION tollgate.purge_sealed_events(timestamptz, integer) IS
    'Does the work of purge_audit_log; called in any other way, the trigger on the log refuses its DELETE. Internal.';

CREATE FUNCTION tollgate.purge_audit_log(before timestamptz, max_events integer DEFAULT 100000) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'purge_audit_log';
COMMENT ON FUNCTION tollgate.purge_audit_log(timestamptz, integer) IS
    'Removes sealed events older than a time, whole stretches from the oldest on, of about that many events at most, none that a subscription has still to receive, and none younger than tollgate.min_audit_retention; their seals stay, the purge is recorded as a seal, and the log stays verifiable. Returns how many; call again until 0; event audit.purged';
