-- The audit log, which is also the outbox: what happened, by whom and when. Reading it is in events.sql, sealing and
-- purging it in seals.sql.

CREATE SEQUENCE tollgate.audit_log_id_seq;

CREATE TABLE tollgate.audit_log (
    id          bigint      NOT NULL DEFAULT tollgate.next_id('tollgate.audit_log_id_seq') PRIMARY KEY,
    xid         xid8        NOT NULL DEFAULT pg_current_xact_id(),
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    event       text        NOT NULL,
    token_id    uuid,
    user_id     text,
    actor       text        NOT NULL DEFAULT tollgate.acting_role(),
    client_addr inet        DEFAULT inet_client_addr(),
    detail      jsonb       NOT NULL DEFAULT '{}',
    epoch       integer     NOT NULL DEFAULT tollgate.current_epoch()
);
COMMENT ON TABLE tollgate.audit_log IS 'One row per event, append-only, in the order of (epoch, xid, id)';
CREATE INDEX audit_log_position ON tollgate.audit_log (epoch, xid, id);
CREATE INDEX audit_log_token ON tollgate.audit_log (token_id) WHERE token_id IS NOT NULL;
ALTER SEQUENCE tollgate.audit_log_id_seq OWNED BY tollgate.audit_log.id;
SELECT pg_extension_config_dump('tollgate.audit_log', '');
SELECT pg_extension_config_dump('tollgate.audit_log_id_seq', '');

CREATE FUNCTION tollgate.is_purging_audit_log() RETURNS boolean
    LANGUAGE c STABLE PARALLEL RESTRICTED
    AS 'MODULE_PATHNAME', 'is_purging_audit_log';
COMMENT ON FUNCTION tollgate.is_purging_audit_log() IS
    'Whether purge_audit_log is running in this session: a flag of the library that nothing else can set. Internal.';

CREATE FUNCTION tollgate.refuse_audit_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP = 'DELETE' AND TG_TABLE_NAME = 'audit_log' AND tollgate.is_purging_audit_log() THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'the audit log is append-only: % of tollgate.% is refused', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege',
              HINT = 'Events are never changed. Old ones are removed with tollgate.purge_audit_log(before).';
END
$$;
COMMENT ON FUNCTION tollgate.refuse_audit_change() IS
    'Trigger that refuses UPDATE, DELETE and TRUNCATE of the audit log, its epochs and its seals, even by their owner. Internal.';

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON tollgate.audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION tollgate.refuse_audit_change();
ALTER TABLE tollgate.audit_log ENABLE ALWAYS TRIGGER append_only;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON tollgate.audit_epochs
    FOR EACH STATEMENT EXECUTE FUNCTION tollgate.refuse_audit_change();
ALTER TABLE tollgate.audit_epochs ENABLE ALWAYS TRIGGER append_only;

-- Transaction ids have a meaning only in the cluster that assigned them. So an event that arrives through a
-- subscription gets a new place in this log, in the order in which it was committed at the publisher. Event, actor and
-- time stay the same. Received events are only ever added: retention and seals are those of this log.
CREATE FUNCTION tollgate.place_received_event() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.id := tollgate.next_id('tollgate.audit_log_id_seq');
    NEW.xid := pg_current_xact_id();
    NEW.epoch := tollgate.current_epoch();
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION tollgate.place_received_event() IS
    'Trigger that gives an event received by a subscription a place in this log. Internal.';

CREATE TRIGGER place_received BEFORE INSERT ON tollgate.audit_log
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.place_received_event();
ALTER TABLE tollgate.audit_log ENABLE REPLICA TRIGGER place_received;

-- Here its id belongs to another event.
CREATE TRIGGER leave_out BEFORE UPDATE OR DELETE ON tollgate.audit_log
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.leave_out();
ALTER TABLE tollgate.audit_log ENABLE REPLICA TRIGGER leave_out;

CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE OR DELETE ON tollgate.audit_epochs
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.leave_out();
ALTER TABLE tollgate.audit_epochs ENABLE REPLICA TRIGGER leave_out;

-- The only place that knows the channel and the payload. A payload is at most 8000 bytes, so the reason is shortened to
-- what a listener needs at a glance; the log has all of it.
--
-- Every role may NOTIFY, and one session that LISTENs and does not end its transaction keeps the notification queue of
-- the whole server. When the queue is full, a transaction that notifies fails at its commit. So above half full ours do
-- not notify: taking access away must not depend on a queue that any role can fill, and readers of the log find the
-- event there.
CREATE FUNCTION tollgate.notify_token_event(event text, token_id uuid, user_id text, reason text, affected bigint) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT pg_notify('tollgate_events',
        CASE WHEN $5 IS NULL
            THEN json_build_object('event', $1, 'token_id', $2, 'user_id', $3, 'reason', left($4, 200))
            ELSE json_build_object('event', $1, 'user_id', $3, 'count', $5)
        END::text)
    WHERE current_setting('tollgate.notify')::boolean AND pg_notification_queue_usage() <= 0.5;
END;
COMMENT ON FUNCTION tollgate.notify_token_event(text, uuid, text, text, bigint) IS
    'Notifies listeners of tollgate_events that access was taken away, of one token or of several at once; not if tollgate.notify is off, nor if the queue is more than half full. Internal.';
