-- Epochs: the periods of the audit log's history within which transaction ids are comparable.
--
-- The log is read by transaction ids (events.sql). They start again in the cluster that a dump is restored into, and
-- are assigned a second time by a standby that was promoted without the last transactions of its primary. So every
-- event has the number of its epoch, and the first event in another cluster (by system identifier) or on another
-- timeline opens the next one, permanently: a dump that returns to the cluster it was made in opens one more.
--
-- Within one cluster transaction ids grow from epoch to epoch, since a transaction does not survive a promotion, except
-- a prepared one, which ends after it. Such epochs form a lineage: one horizon applies to all of them.

CREATE TABLE tollgate.audit_epochs (
    epoch             integer     NOT NULL,
    xid               xid8        NOT NULL DEFAULT pg_current_xact_id(),
    identity          uuid        NOT NULL,
    system_identifier bigint      NOT NULL,
    timeline          integer     NOT NULL,
    begun_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (epoch, xid)
);
COMMENT ON TABLE tollgate.audit_epochs IS
    'The cluster and timeline on which the events of an epoch were written. Each transaction that finds its epoch unregistered registers it, with the same values, so that none waits for another';
COMMENT ON COLUMN tollgate.audit_epochs.identity IS
    'Distinguishes the epochs of one number that two copies of a database opened; part of every cursor';
SELECT pg_extension_config_dump('tollgate.audit_epochs', '');

CREATE FUNCTION tollgate.system_identifier() RETURNS bigint
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'system_identifier';
COMMENT ON FUNCTION tollgate.system_identifier() IS 'The system identifier, which a cluster shares with its standbys and with no other cluster. Internal.';

CREATE FUNCTION tollgate.wal_timeline() RETURNS integer
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'wal_timeline';
COMMENT ON FUNCTION tollgate.wal_timeline() IS 'The timeline that this server writes; NULL on a standby. Internal.';

CREATE FUNCTION tollgate.current_epoch() RETURNS integer
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    cluster bigint  := tollgate.system_identifier();
    line    integer := tollgate.wal_timeline();
    newest  record;
BEGIN
    SELECT e.epoch, e.system_identifier, e.timeline INTO newest
        FROM tollgate.audit_epochs e ORDER BY e.epoch DESC, e.xid DESC LIMIT 1;
    IF newest.system_identifier = cluster AND newest.timeline = line THEN
        RETURN newest.epoch;
    END IF;
    newest.epoch := coalesce(newest.epoch, 0) + 1;
    -- All transactions that get here before the first of them commits write the same values: what they know of the
    -- server's last start replaces a random number, which only one of them could choose.
    INSERT INTO tollgate.audit_epochs (epoch, identity, system_identifier, timeline)
        VALUES (newest.epoch,
                encode(substr(sha256(int4send(newest.epoch) || int8send(cluster) || int4send(line)
                                     || timestamptz_send(pg_postmaster_start_time())), 1, 16), 'hex')::uuid,
                cluster, line);
    RETURN newest.epoch;
END
$$;
COMMENT ON FUNCTION tollgate.current_epoch() IS
    'The epoch of an event written now; registers it if it is new. Internal.';

CREATE FUNCTION tollgate.epoch_lineage(epoch integer) RETURNS integer
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT coalesce(max(o.epoch), 0) + 1
    FROM tollgate.audit_epochs o
    WHERE o.epoch < $1
      AND o.system_identifier <> (SELECT e.system_identifier FROM tollgate.audit_epochs e WHERE e.epoch = $1 LIMIT 1);
END;
COMMENT ON FUNCTION tollgate.epoch_lineage(integer) IS
    'The first of the epochs up to this one that were written in the same cluster without another''s in between. Internal.';

CREATE TYPE tollgate.audit_place AS (epoch integer, xid xid8);
COMMENT ON TYPE tollgate.audit_place IS 'A place in the audit log: before the events of this transaction id in this epoch. Internal.';

CREATE FUNCTION tollgate.place_of_horizon(epoch integer, horizon xid8) RETURNS tollgate.audit_place
    LANGUAGE sql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    -- A prepared transaction may hold a horizon in an earlier epoch than the one that was reached.
    SELECT coalesce(max(e.epoch), tollgate.epoch_lineage($1)), $2
    FROM tollgate.audit_epochs e
    WHERE e.epoch BETWEEN tollgate.epoch_lineage($1) AND $1 AND e.xid <= $2;
END;
COMMENT ON FUNCTION tollgate.place_of_horizon(integer, xid8) IS
    'The place below which everything is below a horizon in the lineage of an epoch. Internal.';

CREATE FUNCTION tollgate.final_place() RETURNS tollgate.audit_place
    LANGUAGE plpgsql STABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    newest integer := (SELECT max(e.epoch) FROM tollgate.audit_epochs e);
BEGIN
    IF newest IS NULL THEN
        RETURN (0, '0'::xid8)::tollgate.audit_place;
    END IF;
    -- The newest epoch was written by another cluster, so all of it is final here.
    IF NOT EXISTS (SELECT FROM tollgate.audit_epochs e WHERE e.epoch = newest AND e.system_identifier = tollgate.system_identifier()) THEN
        RETURN (newest + 1, '0'::xid8)::tollgate.audit_place;
    END IF;
    RETURN tollgate.place_of_horizon(newest, pg_snapshot_xmin(pg_current_snapshot()));
END
$$;
COMMENT ON FUNCTION tollgate.final_place() IS
    'The place below which every transaction has ended, so that nothing is added to the audit log there any more. Internal.';
