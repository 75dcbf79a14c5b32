-- Webhooks: events as HTTP requests, by the Standard Webhooks specification. Messages wait here in a queue that the
-- daemon processes under leases: if a daemon dies, its messages become available to the next one, and a message that is
-- sent again keeps its id.

CREATE TABLE tollgate.webhook_endpoints (
    name            text        PRIMARY KEY,
    url             text        NOT NULL,
    events          text[],
    secret          bytea       NOT NULL,
    previous_secret bytea,
    previous_until  timestamptz,
    enabled         boolean     NOT NULL DEFAULT true,
    disabled_reason text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    created_by      text        NOT NULL DEFAULT tollgate.acting_role(),
    last_success_at timestamptz,
    last_failure_at timestamptz,
    last_error      text,
    paused_at       timestamptz
) WITH (fillfactor = 50);
COMMENT ON TABLE tollgate.webhook_endpoints IS 'Receivers of webhooks, with the secrets that sign their messages: the only secrets here that must be stored in plain text';
COMMENT ON COLUMN tollgate.webhook_endpoints.enabled IS 'Whether events are queued for it, and sent';
COMMENT ON COLUMN tollgate.webhook_endpoints.paused_at IS 'Since when its queued messages wait; NULL while they are sent';
SELECT pg_extension_config_dump('tollgate.webhook_endpoints', '');

CREATE SEQUENCE tollgate.webhook_queue_id_seq;

CREATE TABLE tollgate.webhook_queue (
    id              bigint      NOT NULL DEFAULT tollgate.next_id('tollgate.webhook_queue_id_seq') PRIMARY KEY,
    webhook         text        NOT NULL REFERENCES tollgate.webhook_endpoints ON DELETE CASCADE,
    event_epoch     integer     NOT NULL,
    event_id        bigint      NOT NULL,
    event           text        NOT NULL,
    body            text        NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    attempts        integer     NOT NULL DEFAULT 0,
    -- Different for each message, so that a claim can start right after the last one.
    next_attempt_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease           uuid,
    last_attempt_at timestamptz,
    last_status     integer,
    last_error      text,
    dead_at         timestamptz
);
COMMENT ON TABLE tollgate.webhook_queue IS 'Messages that are not delivered yet, and those that were given up (dead_at)';
COMMENT ON COLUMN tollgate.webhook_queue.lease IS 'The lease of the daemon that is sending it; void from next_attempt_at on';
CREATE INDEX webhook_queue_waiting ON tollgate.webhook_queue (webhook, next_attempt_at, id) WHERE dead_at IS NULL;
CREATE INDEX webhook_queue_leased ON tollgate.webhook_queue (webhook, next_attempt_at) WHERE lease IS NOT NULL AND dead_at IS NULL;
CREATE INDEX webhook_queue_dead ON tollgate.webhook_queue (dead_at, id) WHERE dead_at IS NOT NULL;
CREATE INDEX webhook_queue_age ON tollgate.webhook_queue (webhook, created_at, id);
ALTER SEQUENCE tollgate.webhook_queue_id_seq OWNED BY tollgate.webhook_queue.id;
SELECT pg_extension_config_dump('tollgate.webhook_queue', '');
SELECT pg_extension_config_dump('tollgate.webhook_queue_id_seq', '');

-- The number of waiting messages is needed every few seconds, without counting them. Triggers on the queue maintain the
-- numbers, so they are right however it is changed. They are not dumped, since restoring the queue counts again.
--
-- A change replaces the row of a webhook by one with the next version, instead of updating it. While an older
-- transaction is open, such as that of pg_dump, nothing is removed, and a row that is updated for each message is found
-- only after all of its earlier versions. The newest version is the last of its webhook in the index, so it is found at
-- once.
--
-- due_from is where a claim starts to look. Delivered messages leave dead entries at the front of an index, which stay
-- as long: each claim would pass over all of them.
CREATE TABLE tollgate.webhook_backlogs (
    webhook  text        NOT NULL,
    version  bigint      NOT NULL,
    waiting  bigint      NOT NULL,
    dead     bigint      NOT NULL,
    sending  bigint      NOT NULL,
    due_from timestamptz NOT NULL,
    PRIMARY KEY (webhook, version)
);
COMMENT ON TABLE tollgate.webhook_backlogs IS
    'The number of queued messages of each webhook, in one row each; maintained by triggers on the queue, and not dumped. No foreign key: a row may be replaced while its webhook is being dropped';
COMMENT ON COLUMN tollgate.webhook_backlogs.version IS 'Incremented by each change';
COMMENT ON COLUMN tollgate.webhook_backlogs.sending IS 'The number of waiting messages that have a lease, valid or not';
COMMENT ON COLUMN tollgate.webhook_backlogs.due_from IS 'No waiting message has its next attempt before this. Lowered by the triggers, raised by a claim that has locked the row';

CREATE FUNCTION tollgate.webhook_backlog(webhook text) RETURNS tollgate.webhook_backlogs
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET enable_sort = off
AS $$
DECLARE
    backlog tollgate.webhook_backlogs;
BEGIN
    SELECT b.* INTO backlog FROM tollgate.webhook_backlogs b WHERE b.webhook = $1 ORDER BY b.version DESC LIMIT 1;
    RETURN backlog;
END
$$;
COMMENT ON FUNCTION tollgate.webhook_backlog(text) IS 'The message counts of a webhook; NULL if it has had none. Internal.';

CREATE FUNCTION tollgate.replace_webhook_backlog(backlog tollgate.webhook_backlogs) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
AS $$
BEGIN
    DELETE FROM tollgate.webhook_backlogs b WHERE b.webhook = ($1).webhook AND b.version = ($1).version;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    backlog.version := backlog.version + 1;
    INSERT INTO tollgate.webhook_backlogs SELECT backlog.*;
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.replace_webhook_backlog(tollgate.webhook_backlogs) IS
    'Replaces the message counts of a webhook by a new version; false if another session has replaced the old version. Internal.';

CREATE FUNCTION tollgate.change_webhook_backlog(
    webhook text, waiting bigint, dead bigint, sending bigint, due_from timestamptz DEFAULT NULL) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    backlog tollgate.webhook_backlogs;
BEGIN
    LOOP
        backlog := tollgate.webhook_backlog($1);
        IF backlog.webhook IS NULL THEN
            -- The row is already gone if the webhook is being dropped.
            EXIT WHEN $2 + $3 <= 0;
            INSERT INTO tollgate.webhook_backlogs VALUES ($1, 1, $2, $3, $4, '-infinity') ON CONFLICT DO NOTHING;
            EXIT WHEN FOUND;
            CONTINUE;
        END IF;
        backlog.waiting := backlog.waiting + $2;
        backlog.dead := backlog.dead + $3;
        backlog.sending := backlog.sending + $4;
        backlog.due_from := least(backlog.due_from, $5);
        EXIT WHEN tollgate.replace_webhook_backlog(backlog);
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.change_webhook_backlog(text, bigint, bigint, bigint, timestamptz) IS
    'Adds to the message counts of a webhook; due is the earliest next attempt among them. Internal.';

CREATE FUNCTION tollgate.count_webhook_messages() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- In the order of their names, so that two sessions that count do not deadlock.
    IF TG_OP = 'INSERT' THEN
        PERFORM tollgate.change_webhook_backlog(
                n.webhook, count(*) - count(n.dead_at), count(n.dead_at),
                count(n.lease) FILTER (WHERE n.dead_at IS NULL), min(n.next_attempt_at) FILTER (WHERE n.dead_at IS NULL))
            FROM new_messages n GROUP BY n.webhook ORDER BY n.webhook;
    ELSIF TG_OP = 'DELETE' THEN
        PERFORM tollgate.change_webhook_backlog(
                o.webhook, count(o.dead_at) - count(*), - count(o.dead_at), - count(o.lease) FILTER (WHERE o.dead_at IS NULL))
            FROM old_messages o GROUP BY o.webhook ORDER BY o.webhook;
    ELSIF TG_OP = 'UPDATE' THEN
        PERFORM tollgate.change_webhook_backlog(
                c.webhook, sum(CASE WHEN c.dead_at IS NULL THEN c.sign ELSE 0 END), sum(CASE WHEN c.dead_at IS NOT NULL THEN c.sign ELSE 0 END),
                sum(CASE WHEN c.lease IS NOT NULL AND c.dead_at IS NULL THEN c.sign ELSE 0 END),
                min(c.next_attempt_at) FILTER (WHERE c.sign > 0 AND c.dead_at IS NULL))
            FROM (SELECT 1 AS sign, n.webhook, n.dead_at, n.lease, n.next_attempt_at FROM new_messages n
                  UNION ALL
                  SELECT -1, o.webhook, o.dead_at, o.lease, o.next_attempt_at FROM old_messages o) c
            GROUP BY c.webhook ORDER BY c.webhook;
    ELSE
        DELETE FROM tollgate.webhook_backlogs;
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION tollgate.count_webhook_messages() IS 'Trigger that maintains the message counts of webhooks. Internal.';

CREATE TRIGGER count_inserted AFTER INSERT ON tollgate.webhook_queue
    REFERENCING NEW TABLE AS new_messages FOR EACH STATEMENT EXECUTE FUNCTION tollgate.count_webhook_messages();
CREATE TRIGGER count_updated AFTER UPDATE ON tollgate.webhook_queue
    REFERENCING OLD TABLE AS old_messages NEW TABLE AS new_messages FOR EACH STATEMENT EXECUTE FUNCTION tollgate.count_webhook_messages();
CREATE TRIGGER count_deleted AFTER DELETE ON tollgate.webhook_queue
    REFERENCING OLD TABLE AS old_messages FOR EACH STATEMENT EXECUTE FUNCTION tollgate.count_webhook_messages();
CREATE TRIGGER count_truncated AFTER TRUNCATE ON tollgate.webhook_queue
    FOR EACH STATEMENT EXECUTE FUNCTION tollgate.count_webhook_messages();

CREATE FUNCTION tollgate.new_webhook_secret() RETURNS bytea
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- 244 bits from the operating system's generator.
    SELECT sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()));
END;
COMMENT ON FUNCTION tollgate.new_webhook_secret() IS 'A random secret of 32 bytes. Internal.';

CREATE FUNCTION tollgate.no_such_webhook(name text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.without_token('name', $1);
    RAISE EXCEPTION 'there is no webhook %', tollgate.quote_redacted($1)
        USING ERRCODE = 'undefined_object', DETAIL = 'Argument: name.',
              HINT = 'tollgate.webhooks lists them; tollgate.define_webhook(name, url) creates one.';
END
$$;
COMMENT ON FUNCTION tollgate.no_such_webhook(text) IS 'Raises 42704, or 22023 for a name that contains a token. Internal.';

CREATE FUNCTION tollgate.webhook_url(url text) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    label  constant text := '[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?';
    -- Scheme, host, port, path and query. No user and password: they would be sent to whatever host the name resolves
    -- to. No fragment: it is never sent.
    parts  constant text[] := regexp_match($1,
        '^(https?)://([[][0-9A-Fa-f:.]{2,45}[]]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?((?:[/?](?:[A-Za-z0-9._~:/?@!$&''()*+,;=-]|%[0-9A-Fa-f]{2})*)?)$');
    scheme constant text := parts[1];
    port   constant integer := parts[3];
    host   text := lower(parts[2]);
BEGIN
    IF parts IS NULL OR length($1) > 2000 OR $1 ~ '[0-9A-Fa-f]{80}' OR port NOT BETWEEN 1 AND 65535 THEN
        RETURN NULL;
    END IF;
    BEGIN
        host := CASE
            WHEN host LIKE '[%:%' THEN '[' || host(trim(host, '[]')::inet) || ']'
            -- A host that ends in a number is an address, and must have the usual form of one.
            WHEN host ~ '(^|[.])([0-9]+|0x[0-9a-f]*)$' THEN host(host::inet)
            WHEN host ~ ('^' || label || '([.]' || label || ')*$') THEN host
        END;
    EXCEPTION WHEN invalid_text_representation THEN
        RETURN NULL;
    END;
    IF host ~ '^[0-9.]+$' AND host <> lower(parts[2]) THEN
        RETURN NULL;
    END IF;
    RETURN scheme || '://' || host
        || CASE WHEN port <> CASE scheme WHEN 'https' THEN 443 ELSE 80 END THEN ':' || port ELSE '' END
        || CASE WHEN parts[4] LIKE '/%' THEN '' ELSE '/' END || parts[4];
END
$$;
COMMENT ON FUNCTION tollgate.webhook_url(text) IS
    'The normalised form of an address that a webhook can be sent to: the host in lower case, no default port, at least / as path; NULL if it is not valid. Internal.';

CREATE FUNCTION tollgate.check_webhook_url(url text) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    address constant text := tollgate.webhook_url($1);
BEGIN
    IF address IS NULL THEN
        RAISE EXCEPTION 'this is not an address that a webhook can be sent to'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: url.',
                  HINT = 'Give https://host/path, at most 2000 characters, with a port of 1 to 65535 if any, without user, password and fragment, special characters as %XX.';
    END IF;
    RETURN address;
END
$$;
COMMENT ON FUNCTION tollgate.check_webhook_url(text) IS 'The normalised address; raises 22023 if it is not valid. Internal.';

CREATE FUNCTION tollgate.host_of_url(url text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT substring($1 FROM '^https?://([^/]+)');
END;
COMMENT ON FUNCTION tollgate.host_of_url(text) IS 'The part of an address that events show, since the path is often a secret. Internal.';

CREATE FUNCTION tollgate.define_webhook(name text, url text, events text[] DEFAULT NULL) RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    new_secret bytea := tollgate.new_webhook_secret();
    address    text;
BEGIN
    IF $1 IS NULL OR $1 !~ '^[a-z0-9][a-z0-9_.-]{0,62}$' OR $1 ~ '[0-9a-f]{16}' THEN
        RAISE EXCEPTION 'this is not a name for a webhook: %', tollgate.quote_redacted($1)
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: name.',
                  HINT = 'A name is 1 to 63 of a-z, 0-9, "_", "." and "-", begins with a letter or digit, and is not secret: metrics and logs show it.';
    END IF;
    address := tollgate.check_webhook_url($2);
    IF $3 IS NOT NULL AND (cardinality($3) NOT BETWEEN 1 AND 100 OR array_position($3, NULL) IS NOT NULL
                           OR EXISTS (SELECT FROM unnest($3) AS e (event) WHERE e.event !~ '^[a-z_]{1,40}[.]([a-z_]{1,40}|[*])$')) THEN
        RAISE EXCEPTION 'these are not names of events'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: events.',
                  HINT = 'Leave them out for all events, or name 1 to 100 of them: a name is such as token.revoked, and token.* stands for all that begin so.';
    END IF;
    -- One at a time, because the webhooks are counted.
    LOCK TABLE tollgate.webhook_endpoints IN SHARE ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM tollgate.webhook_endpoints e WHERE e.name = $1) THEN
        RAISE EXCEPTION 'there is a webhook % already', tollgate.quote_redacted($1)
            USING ERRCODE = 'duplicate_object', DETAIL = 'Argument: name.',
                  HINT = 'Drop it with tollgate.drop_webhook(name), or choose another name.';
    END IF;
    IF (SELECT count(*) FROM tollgate.webhook_endpoints) >= 64 THEN
        RAISE EXCEPTION 'there are 64 webhooks, which is as many as there may be'
            USING ERRCODE = 'program_limit_exceeded',
                  HINT = 'Drop one with tollgate.drop_webhook(name), or send to one receiver that forwards.';
    END IF;
    INSERT INTO tollgate.webhook_endpoints (name, url, events, secret) VALUES ($1, address, $3, new_secret);
    -- From now on, not from the daemon's first run.
    PERFORM tollgate.open_subscription('tollgate:webhooks');
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES ('webhook.defined', jsonb_build_object('webhook', $1, 'host', tollgate.host_of_url(address), 'events', $3));
    RETURN 'whsec_' || encode(new_secret, 'base64');
END
$$;
COMMENT ON FUNCTION tollgate.define_webhook(text, text, text[]) IS
    'Sends events to an address from now on, all of them or the named ones, and returns the secret that signs them: the only time it is shown; event webhook.defined';

CREATE FUNCTION tollgate.rotate_webhook_secret(name text, grace interval DEFAULT '1 day') RETURNS text
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    new_secret bytea := tollgate.new_webhook_secret();
BEGIN
    IF $2 IS NULL OR $2 < interval '0' OR $2 > interval '30 days' THEN
        RAISE EXCEPTION 'a grace is from nothing to 30 days'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = format('Argument: grace, of %s.', coalesce($2::text, 'NULL')),
                  HINT = 'Give how long messages are also signed with the old secret, such as 1 day.';
    END IF;
    UPDATE tollgate.webhook_endpoints e
        SET secret = new_secret, previous_secret = CASE WHEN $2 > interval '0' THEN e.secret END,
            previous_until = CASE WHEN $2 > interval '0' THEN now() + $2 END
        WHERE e.name = $1;
    IF NOT FOUND THEN
        PERFORM tollgate.no_such_webhook($1);
    END IF;
    INSERT INTO tollgate.audit_log (event, detail) VALUES ('webhook.rotated', jsonb_build_object('webhook', $1, 'grace', $2));
    RETURN 'whsec_' || encode(new_secret, 'base64');
END
$$;
COMMENT ON FUNCTION tollgate.rotate_webhook_secret(text, interval) IS
    'Gives a webhook a new secret and returns it: the only time it is shown. During the grace messages are signed with the old one too; event webhook.rotated';

CREATE FUNCTION tollgate.set_webhook_enabled(name text, enabled boolean) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $2 IS NULL THEN
        RAISE EXCEPTION 'a webhook is enabled or not'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: enabled, which is NULL.', HINT = 'Give true or false.';
    END IF;
    UPDATE tollgate.webhook_endpoints e SET enabled = $2, disabled_reason = CASE WHEN NOT $2 THEN 'by an administrator' END
        WHERE e.name = $1 AND e.enabled <> $2;
    IF NOT FOUND THEN
        IF NOT EXISTS (SELECT FROM tollgate.webhook_endpoints e WHERE e.name = $1) THEN
            PERFORM tollgate.no_such_webhook($1);
        END IF;
        RETURN false;
    END IF;
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES (CASE WHEN $2 THEN 'webhook.enabled' ELSE 'webhook.disabled' END, jsonb_build_object('webhook', $1));
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.set_webhook_enabled(text, boolean) IS
    'Stops or resumes sending to a webhook; false if it is already in that state. Events that occur while it is disabled are not queued for it; event webhook.enabled or webhook.disabled';

CREATE FUNCTION tollgate.set_webhook_url(name text, url text) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    address constant text := tollgate.check_webhook_url($2);
    before  text;
BEGIN
    SELECT e.url INTO before FROM tollgate.webhook_endpoints e WHERE e.name = $1 FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM tollgate.no_such_webhook($1);
    END IF;
    IF before = address THEN
        RETURN false;
    END IF;
    UPDATE tollgate.webhook_endpoints e SET url = address WHERE e.name = $1;
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES ('webhook.moved', jsonb_build_object('webhook', $1, 'from', tollgate.host_of_url(before), 'to', tollgate.host_of_url(address)));
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.set_webhook_url(text, text) IS
    'Sends the messages of a webhook to another address from now on, including those that wait, with the same secret; false if it is already that address; event webhook.moved';

CREATE FUNCTION tollgate.set_webhook_paused(name text, paused boolean) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE tollgate.webhook_endpoints e SET paused_at = CASE WHEN $2 THEN clock_timestamp() END
        WHERE e.name = $1 AND (e.paused_at IS NULL) = $2;
    IF NOT FOUND THEN
        IF NOT EXISTS (SELECT FROM tollgate.webhook_endpoints e WHERE e.name = $1) THEN
            PERFORM tollgate.no_such_webhook($1);
        END IF;
        RETURN false;
    END IF;
    INSERT INTO tollgate.audit_log (event, detail)
        VALUES (CASE WHEN $2 THEN 'webhook.paused' ELSE 'webhook.resumed' END, jsonb_build_object('webhook', $1));
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.set_webhook_paused(text, boolean) IS 'The body of pause_webhook and resume_webhook. Internal.';

CREATE FUNCTION tollgate.pause_webhook(name text) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.set_webhook_paused($1, true);
END;
COMMENT ON FUNCTION tollgate.pause_webhook(text) IS
    'Queues messages for a webhook but sends none until resume_webhook; false if it is already paused; event webhook.paused';

CREATE FUNCTION tollgate.resume_webhook(name text) RETURNS boolean
    LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT tollgate.set_webhook_paused($1, false);
END;
COMMENT ON FUNCTION tollgate.resume_webhook(text) IS
    'Ends the pause of a webhook, so that the queued messages are sent; false if it is not paused; event webhook.resumed';

CREATE FUNCTION tollgate.drop_webhook(name text) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM tollgate.without_token('name', $1);
    -- In the lock order of queueing and of finishing a delivery, so that they do not deadlock.
    PERFORM FROM tollgate.subscriptions s WHERE s.name = 'tollgate:webhooks' FOR UPDATE;
    LOCK TABLE tollgate.webhook_endpoints IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM tollgate.webhook_endpoints e WHERE e.name = $1;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM tollgate.webhook_backlogs b WHERE b.webhook = $1;
    IF NOT EXISTS (SELECT FROM tollgate.webhook_endpoints) THEN
        -- It would block purge_audit_log.
        DELETE FROM tollgate.subscriptions s WHERE s.name = 'tollgate:webhooks';
    END IF;
    INSERT INTO tollgate.audit_log (event, detail) VALUES ('webhook.dropped', jsonb_build_object('webhook', $1));
    RETURN true;
END
$$;
COMMENT ON FUNCTION tollgate.drop_webhook(text) IS
    'Drops a webhook, its secret and its queued messages; false if there is none of that name; event webhook.dropped';

CREATE VIEW tollgate.webhooks AS
    SELECT e.name, e.url, e.events, e.enabled, e.disabled_reason, e.paused_at, e.created_at, e.created_by,
           CASE WHEN e.previous_until > now() THEN e.previous_until END AS old_secret_until,
           coalesce(b.waiting, 0) AS pending, coalesce(b.dead, 0) AS dead,
           e.last_success_at, e.last_failure_at, e.last_error
    FROM tollgate.webhook_endpoints e
    LEFT JOIN LATERAL (SELECT n.waiting, n.dead FROM tollgate.webhook_backlogs n WHERE n.webhook = e.name ORDER BY n.version DESC LIMIT 1) b ON true;
COMMENT ON VIEW tollgate.webhooks IS 'The webhooks, without their secrets, and their status';

CREATE VIEW tollgate.webhook_deliveries AS
    SELECT q.id, q.webhook, 'evt_' || q.event_epoch || '_' || q.event_id AS message_id, q.event,
           CASE WHEN q.dead_at IS NOT NULL THEN 'dead' WHEN q.lease IS NOT NULL AND q.next_attempt_at > now() THEN 'sending'
                ELSE 'waiting' END AS state,
           q.attempts, q.created_at, CASE WHEN q.dead_at IS NULL THEN q.next_attempt_at END AS next_attempt_at,
           q.last_attempt_at, q.last_status, q.last_error
    FROM tollgate.webhook_queue q;
COMMENT ON VIEW tollgate.webhook_deliveries IS
    'The messages that are not delivered: waiting, sending, or dead, that is, given up until they are replayed or purged';

CREATE FUNCTION tollgate.replay_webhook(name text, delivery bigint DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM tollgate.webhook_endpoints e WHERE e.name = $1) THEN
        PERFORM tollgate.no_such_webhook($1);
    END IF;
    -- One after the other, in the order in which they were queued. Not those that are being sent.
    UPDATE tollgate.webhook_queue q SET dead_at = NULL, attempts = 0, next_attempt_at = now() + r.place * interval '1 microsecond', lease = NULL
        FROM (SELECT w.id, row_number() OVER (ORDER BY w.id) - 1 AS place FROM tollgate.webhook_queue w
              WHERE w.webhook = $1 AND ($2 IS NULL OR w.id = $2)
                AND (w.dead_at IS NOT NULL OR w.lease IS NULL AND w.next_attempt_at > now())) r
        WHERE q.id = r.id AND (q.dead_at IS NOT NULL OR q.lease IS NULL AND q.next_attempt_at > now());
    GET DIAGNOSTICS affected = ROW_COUNT;
    IF affected > 0 THEN
        INSERT INTO tollgate.audit_log (event, detail)
            VALUES ('webhook.replayed', jsonb_build_object('webhook', $1, 'messages', affected));
    END IF;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.replay_webhook(text, bigint) IS
    'Sends messages of a webhook again now, those that were given up and those that wait for another attempt, all or the one with that id, with the same ids, and returns how many; event webhook.replayed';

CREATE FUNCTION tollgate.disable_webhook(name text, reason text) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH disabled AS (
        UPDATE tollgate.webhook_endpoints e SET enabled = false, disabled_reason = $2 WHERE e.name = $1 AND e.enabled RETURNING e.name
    )
    INSERT INTO tollgate.audit_log (event, detail)
        SELECT 'webhook.disabled', jsonb_build_object('webhook', d.name, 'reason', $2) FROM disabled d;
END;
COMMENT ON FUNCTION tollgate.disable_webhook(text, text) IS 'Disables a webhook whose receiver asks for that, or has been gone for too long. Internal.';

CREATE FUNCTION tollgate.queue_webhook_deliveries(max_events integer DEFAULT 1000, OUT events bigint, OUT caught_up boolean)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    place  tollgate.event_cursor;
    batch  tollgate.event_batch;
    most   bigint;
    full_one text;
BEGIN
    PERFORM tollgate.check_event_count($1);
    events := 0;
    caught_up := true;
    IF NOT EXISTS (SELECT FROM tollgate.webhook_endpoints) THEN
        RETURN;
    END IF;
    -- Checked first without locking or writing anything.
    IF EXISTS (SELECT FROM tollgate.subscriptions s
               WHERE s.name = 'tollgate:webhooks' AND s.advanced_at > now() - interval '1 minute' AND NOT tollgate.has_events(s.place)) THEN
        RETURN;
    END IF;
    SELECT o.* INTO place FROM tollgate.open_subscription('tollgate:webhooks') o;
    IF NOT FOUND THEN
        -- Another daemon is doing the same now.
        RETURN;
    END IF;
    SELECT r.* INTO batch FROM tollgate.read_events(place, $1) r;
    events := jsonb_array_length(batch.events);
    caught_up := batch.caught_up;
    IF events > 0 THEN
        -- Reading events has loaded the library, if nothing else has.
        most := current_setting('tollgate.max_webhook_backlog');
        FOR full_one IN
            SELECT e.name FROM tollgate.webhook_endpoints e CROSS JOIN LATERAL tollgate.webhook_backlog(e.name) b
            WHERE e.enabled AND b.waiting + b.dead >= most
        LOOP
            PERFORM tollgate.disable_webhook(full_one, format('%s messages wait for it', most));
        END LOOP;
        INSERT INTO tollgate.webhook_queue (webhook, event_epoch, event_id, event, body)
            SELECT e.name, (v.event ->> 'epoch')::integer, (v.event ->> 'id')::bigint, v.event ->> 'event',
                   jsonb_build_object('type', v.event -> 'event', 'timestamp', v.event -> 'at', 'data', v.event)::text
            FROM jsonb_array_elements(batch.events) WITH ORDINALITY AS v (event, place)
            JOIN tollgate.webhook_endpoints e ON e.enabled
                AND (e.events IS NULL OR EXISTS (
                    SELECT FROM unnest(e.events) AS w (wanted)
                    WHERE w.wanted = v.event ->> 'event'
                       OR right(w.wanted, 2) = '.*' AND starts_with(v.event ->> 'event', left(w.wanted, -1))))
            ORDER BY v.place;
    END IF;
    UPDATE tollgate.subscriptions s SET place = batch.next, advanced_at = now() WHERE s.name = 'tollgate:webhooks';
END
$$;
COMMENT ON FUNCTION tollgate.queue_webhook_deliveries(integer) IS
    'Reads new events, and queues a message of each for every webhook that wants it, once; returns the number of events, and whether there are no more';

CREATE TYPE tollgate.webhook_message AS (
    id         bigint,
    lease      uuid,
    webhook    text,
    url        text,
    message_id text,
    body       text,
    attempt    integer,
    secrets    bytea[]
);
COMMENT ON TYPE tollgate.webhook_message IS 'A message that is to be sent now, and the secrets that sign it';

CREATE FUNCTION tollgate.claim_webhook_deliveries(per_webhook integer DEFAULT 8, lease interval DEFAULT '2 minutes')
    RETURNS SETOF tollgate.webhook_message
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    -- Whatever the statistics say: a queue fills and empties faster than they are updated.
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
DECLARE
    -- For all that one call returns; and for one webhook, so that each of the 64 gets a share.
    most_bytes constant bigint := 4000000;
    share      constant bigint := most_bytes / 64;
    taken      bigint := 0;
    endpoint   tollgate.webhook_endpoints;
    message    tollgate.webhook_message;
    backlog    tollgate.webhook_backlogs;
    due_from   timestamptz;
    -- Not a call of the function, which is volatile, and so cannot be the bound of an index scan.
    now        constant timestamptz := clock_timestamp();
BEGIN
    IF $1 IS NULL OR $1 NOT BETWEEN 1 AND 1000 OR $2 IS NULL OR $2 < interval '1 second' OR $2 > interval '1 hour' THEN
        RAISE EXCEPTION 'at most 1000 messages of each webhook can be claimed, for a second to an hour'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Arguments: per_webhook, lease.', HINT = 'Claim fewer, and call again.';
    END IF;
    FOR endpoint IN
        -- Webhooks without due messages are not locked, so that an idle poll writes nothing. The longest due come
        -- first: those that do not fit come first the next time.
        SELECT e.* FROM tollgate.webhook_endpoints e
        CROSS JOIN LATERAL tollgate.webhook_backlog(e.name) b
        CROSS JOIN LATERAL (
            SELECT q.next_attempt_at FROM tollgate.webhook_queue q
            WHERE q.webhook = e.name AND q.dead_at IS NULL AND q.next_attempt_at BETWEEN b.due_from AND now
            ORDER BY q.next_attempt_at, q.id LIMIT 1) f
        WHERE e.enabled AND e.paused_at IS NULL
        ORDER BY f.next_attempt_at, e.name FOR NO KEY UPDATE OF e SKIP LOCKED
    LOOP
        -- A session that changes the queue of this webhook holds this row: it is skipped this time.
        backlog := tollgate.webhook_backlog(endpoint.name);
        SELECT b.* INTO backlog FROM tollgate.webhook_backlogs b
            WHERE b.webhook = backlog.webhook AND b.version = backlog.version FOR UPDATE SKIP LOCKED;
        -- One daemon at a time for each webhook, so that messages are sent in order. If one is sending, it has the
        -- latest lease.
        CONTINUE WHEN NOT FOUND OR backlog.sending > 0 AND EXISTS (
            SELECT FROM (SELECT q.next_attempt_at FROM tollgate.webhook_queue q
                         WHERE q.webhook = endpoint.name AND q.dead_at IS NULL AND q.lease IS NOT NULL
                         ORDER BY q.next_attempt_at DESC LIMIT 1) l
            WHERE l.next_attempt_at > now);
        FOR message IN
            WITH due AS (
                SELECT w.id AS due_id
                FROM (SELECT l.id, l.bytes, sum(l.bytes) OVER (ORDER BY l.next_attempt_at, l.id) AS bytes_to_it
                      FROM (SELECT q.id, q.next_attempt_at, octet_length(q.body) AS bytes FROM tollgate.webhook_queue q
                            WHERE q.webhook = endpoint.name AND q.dead_at IS NULL AND q.next_attempt_at BETWEEN backlog.due_from AND now
                            ORDER BY q.next_attempt_at, q.id LIMIT $1 FOR UPDATE SKIP LOCKED) l) w
                -- At least one, unless others leave no room for it.
                WHERE w.bytes_to_it <= least(share, most_bytes - taken)
                   OR w.bytes_to_it = w.bytes AND (taken = 0 OR w.bytes <= most_bytes - taken)
            ), claimed AS (
                UPDATE tollgate.webhook_queue q
                    SET lease = gen_random_uuid(), attempts = q.attempts + 1, last_attempt_at = now,
                        next_attempt_at = now + $2
                    FROM due d WHERE q.id = d.due_id
                    RETURNING q.*
            )
            SELECT c.id, c.lease, c.webhook, endpoint.url, 'evt_' || c.event_epoch || '_' || c.event_id, c.body, c.attempts,
                   CASE WHEN endpoint.previous_until > now THEN ARRAY[endpoint.secret, endpoint.previous_secret]
                        ELSE ARRAY[endpoint.secret] END
            FROM claimed c ORDER BY c.id
        LOOP
            taken := taken + octet_length(message.body);
            RETURN NEXT message;
        END LOOP;
        SELECT q.next_attempt_at INTO due_from FROM tollgate.webhook_queue q
            WHERE q.webhook = endpoint.name AND q.dead_at IS NULL AND q.next_attempt_at >= backlog.due_from
            ORDER BY q.next_attempt_at, q.id LIMIT 1;
        IF due_from > backlog.due_from THEN
            backlog := tollgate.webhook_backlog(endpoint.name);
            backlog.due_from := due_from;
            PERFORM tollgate.replace_webhook_backlog(backlog);
        END IF;
        EXIT WHEN taken >= most_bytes;
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.claim_webhook_deliveries(integer, interval) IS
    'Due messages, some of each webhook and at most 4 MB in all, or one that is larger, for the caller to send while the lease lasts; after that they are due again';

CREATE FUNCTION tollgate.finish_webhook_delivery(
    id bigint, lease uuid, status integer, error text DEFAULT NULL, retry_after interval DEFAULT NULL) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    delays constant interval[] := '{5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h, 24 h}';
    why    constant text := left(regexp_replace($4, '[0-9A-Fa-f]{16,}', '…', 'g'), 500);
    sent   tollgate.webhook_queue;
BEGIN
    -- Before the message, in the order of drop_webhook.
    LOCK TABLE tollgate.webhook_endpoints IN ROW EXCLUSIVE MODE;
    IF $3 BETWEEN 200 AND 299 THEN
        DELETE FROM tollgate.webhook_queue q WHERE q.id = $1 AND q.lease = $2 RETURNING q.* INTO sent;
        -- Once a second is enough, since each time leaves a version of the row.
        UPDATE tollgate.webhook_endpoints e SET last_success_at = clock_timestamp()
            WHERE e.name = sent.webhook AND (e.last_success_at IS NULL OR e.last_success_at < clock_timestamp() - interval '1 second');
        RETURN sent.id IS NOT NULL;
    END IF;
    IF $3 IS NULL AND $4 IS NULL THEN
        -- It was not sent at all.
        UPDATE tollgate.webhook_queue q SET lease = NULL, attempts = q.attempts - 1, next_attempt_at = q.last_attempt_at
            WHERE q.id = $1 AND q.lease = $2;
        RETURN FOUND;
    END IF;
    UPDATE tollgate.webhook_queue q
        SET lease = NULL, last_status = $3, last_error = why,
            dead_at = CASE WHEN q.attempts > cardinality(delays) THEN clock_timestamp() END,
            next_attempt_at = clock_timestamp() + least(greatest(
                -- Up to a fifth more, so that messages that failed together are not retried together.
                delays[least(q.attempts, cardinality(delays))] * (1 + random() / 5), $5), interval '1 day')
        WHERE q.id = $1 AND q.lease = $2
        RETURNING q.* INTO sent;
    UPDATE tollgate.webhook_endpoints e SET last_failure_at = clock_timestamp(), last_error = why
        WHERE e.name = sent.webhook AND (e.last_failure_at IS NULL OR e.last_failure_at < clock_timestamp() - interval '1 second');
    IF $3 = 410 AND sent.id IS NOT NULL THEN
        PERFORM tollgate.disable_webhook(sent.webhook, 'the receiver answered 410 Gone');
    END IF;
    RETURN sent.id IS NOT NULL;
END
$$;
COMMENT ON FUNCTION tollgate.finish_webhook_delivery(bigint, uuid, integer, text, interval) IS
    'Reports the outcome of a claimed message: the HTTP status, or NULL with an error; neither if it was not sent. The message is done, retried after 5 seconds to a day, or dead after 10 attempts; status 410 disables the webhook, event webhook.disabled. False if the lease had ended';

CREATE FUNCTION tollgate.purge_messages_after(
    given_up      boolean,
    retention     interval,
    batch_size    integer,
    INOUT at      timestamptz DEFAULT NULL,
    INOUT id      bigint DEFAULT NULL,
    OUT looked_at bigint,
    OUT purged    bigint
)
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    SET plan_cache_mode = force_generic_plan
    SET jit = off
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET enable_sort = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
AS $$
DECLARE
    batch tid[];
BEGIN
    at := coalesce(at, '-infinity');
    id := coalesce(id, 0);
    IF $1 THEN
        batch := ARRAY(
            SELECT d.ctid FROM tollgate.webhook_queue d
            WHERE d.dead_at IS NOT NULL AND d.dead_at < now() - $2 AND (d.dead_at, d.id) > (at, purge_messages_after.id)
            ORDER BY d.dead_at, d.id LIMIT $3 FOR UPDATE SKIP LOCKED);
    ELSE
        -- A batch of each webhook, to find the oldest of them all.
        batch := ARRAY(
            SELECT o.ctid FROM tollgate.webhook_endpoints e
            CROSS JOIN LATERAL (
                SELECT w.ctid, w.created_at, w.id FROM tollgate.webhook_queue w
                WHERE w.webhook = e.name AND w.created_at < now() - $2 AND (w.created_at, w.id) > (at, purge_messages_after.id)
                ORDER BY w.created_at, w.id LIMIT $3) o
            WHERE NOT e.enabled
            ORDER BY o.created_at, o.id LIMIT $3);
    END IF;
    WITH deleted AS (
        DELETE FROM tollgate.webhook_queue q WHERE q.ctid = ANY (batch)
            RETURNING CASE WHEN $1 THEN q.dead_at ELSE q.created_at END AS at, q.id
    ), furthest AS (
        SELECT d.at, d.id FROM deleted d ORDER BY d.at DESC, d.id DESC LIMIT 1
    )
    SELECT coalesce(f.at, purge_messages_after.at), coalesce(f.id, purge_messages_after.id), a.number, a.number
        INTO purge_messages_after.at, purge_messages_after.id, looked_at, purged
        FROM (SELECT count(*) AS number FROM deleted) a LEFT JOIN furthest f ON true;
END
$$;
COMMENT ON FUNCTION tollgate.purge_messages_after(boolean, interval, integer, timestamptz, bigint) IS
    'A batch of purge_webhook_deliveries after a place (NULL: from the front): of given-up messages, or of all that wait for disabled webhooks. Internal.';

CREATE FUNCTION tollgate.purge_webhook_deliveries(retention interval DEFAULT '30 days', batch_size integer DEFAULT 1000) RETURNS bigint
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    affected bigint;
BEGIN
    PERFORM tollgate.check_retention($1);
    affected := tollgate.continue_walk('purge_given_up', 'tollgate.purge_messages_after(true, $1, $2, $3, $4::bigint)', $1, $2);
    -- Those of a disabled webhook would otherwise stay for ever.
    IF affected < $2 AND EXISTS (SELECT FROM tollgate.webhook_endpoints e WHERE NOT e.enabled) THEN
        affected := affected + tollgate.continue_walk(
            'purge_disabled', 'tollgate.purge_messages_after(false, $1, $2, $3, $4::bigint)', $1, ($2 - affected)::integer);
    END IF;
    RETURN affected;
END
$$;
COMMENT ON FUNCTION tollgate.purge_webhook_deliveries(interval, integer) IS
    'Deletes messages that were given up longer ago than the retention, and those of that age that wait for a disabled webhook, and returns how many';
